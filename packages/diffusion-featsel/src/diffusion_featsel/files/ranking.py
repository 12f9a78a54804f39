"""A ranking on disk: `ranking.safetensors` with statistics of channels and similarities, and its JSON beside it."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffcore.hooks import Site
from diffcore.io import artifact
from diffusion_featsel.activation import Activation
from diffusion_featsel.measured_filter import Filtered
from diffusion_featsel.ranking import Ranking, Scored

FILE = "ranking.safetensors"
SCHEMA = "diffusion-featsel/ranking@1"
_NUMBERS = [field.name for field in fields(Scored) if field.name not in ("activation", "mean", "std")]


def save_ranking(path: Path, ranking: Ranking, filtered: Filtered | None = None, **details: Any) -> Path:
    """Writes a ranking and what a filter made of it.

    Args:
        path: File that is written.
        ranking: Activations with their measurements.
        filtered: Names that a filter keeps, and why it drops the others.
        **details: Plain values about the model and the protocol.
    """
    tensors: dict[str, Tensor] = {}
    for row in ranking.rows:
        tensors[f"mean/{row.name}"], tensors[f"std/{row.name}"] = row.mean.contiguous(), row.std.contiguous()
    if ranking.similarity is not None:
        tensors["similarity"] = ranking.similarity.float().contiguous()
    rows = [
        {"activation": _described(row.activation), **{name: getattr(row, name) for name in _NUMBERS}}
        for row in ranking.rows
    ]
    kept = None if filtered is None else {"kept": list(filtered.kept), "dropped": dict(filtered.dropped)}
    return artifact.save(
        path,
        tensors,
        schema=SCHEMA,
        rows=rows,
        t=ranking.t,
        num_images=ranking.num_images,
        broken=dict(ranking.broken),
        filtered=kept,
        **details,
    )


def read_ranking(path: Path) -> tuple[Ranking, Filtered | None, dict[str, Any]]:
    """Reads a ranking, what a filter made of it, and all other fields.

    Args:
        path: File that `save_ranking` wrote.

    Raises:
        CorruptArtifactError: The file is damaged, or no ranking.
    """
    stored = artifact.load(path, schema=SCHEMA)
    details = dict(stored.fields)
    rows = tuple(
        Scored(
            _activation(row["activation"]),
            mean=stored.tensors[f"mean/{row['activation']['name']}"],
            std=stored.tensors[f"std/{row['activation']['name']}"],
            **{name: row[name] for name in _NUMBERS},
        )
        for row in details["rows"]
    )
    similarity: torch.Tensor | None = stored.tensors.get("similarity")
    kept = details["filtered"]
    filtered = None if kept is None else Filtered(tuple(kept["kept"]), dict(kept["dropped"]))
    return Ranking(rows, details["t"], details["num_images"], similarity, details["broken"]), filtered, details


def _described(activation: Activation) -> dict[str, Any]:
    values = {field.name: getattr(activation, field.name) for field in fields(activation)}
    return values | {"site": [activation.site.module, activation.site.at, activation.site.name]}


def _activation(values: dict[str, Any]) -> Activation:
    known = {field.name for field in fields(Activation)}
    told: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.items() if key in known
    }
    told["site"] = Site(*values["site"])
    return Activation(**told)
