"""A description of an adapter in plain values, made before it is used."""

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from diffcore.adapters import AdapterFile, scan_adapter
from diffcore.adapters.keys import BACKBONE
from diffcore.adapters.read import alphas_of, read_tensors
from diffcore.adapters.scan import refusal
from diffcore.errors import printable
from diffcore.io.strictjson import StrictError
from diffcore.models.bases import base_on_disk, families_of, misfit

_CLAIMS = ("ss_base_model_version", "ss_sd_model_name", "ss_network_module", "modelspec.architecture")


def describe_adapter(path: Path, model: Path | None = None) -> dict[str, Any]:
    """Returns layout, sizes, ranks, alphas and fitting bases of an adapter, and a row per changed module.

    Of its tensors only the alphas are read.

    Args:
        path: A file or PEFT folder.
        model: A model to test it on; without one, the known families are tried.

    Raises:
        UserError: The file is no readable LoRA, or `model` is no readable model.
    """
    found = scan_adapter(path)
    try:
        names = frozenset(pair.alpha for pair in found.pairs if pair.alpha)
        alphas = alphas_of(found, read_tensors(found, names) if names else {})
    except StrictError as error:
        raise refusal(found.path, str(error)) from None
    base = None if model is None else base_on_disk(model)
    reason = None if base is None else misfit(found, base)
    fitting = families_of(found) if base is None else [base] * (reason is None)
    entries = found.header.tensors.values()
    counts = Counter(pair.component for pair in found.pairs)
    return {
        "name": found.path.resolve().name,
        "layout": found.layout,
        "fits": [fit.name for fit in fitting],
        "misfit": reason,
        "claims": _claims(found),
        "modules": counts.pop(BACKBONE, 0),
        "text_encoders": dict(counts),
        "convolutions": sum(any(side != 1 for side in pair.inputs[1:]) for pair in found.pairs),
        "ranks": _counted(pair.rank for pair in found.pairs),
        "alphas": _counted("not stated" if alpha is None else f"{alpha:g}" for alpha in alphas.values()),
        "parameters": sum(math.prod(entry.shape) for entry in entries),
        "precision": ", ".join(sorted({entry.dtype for entry in entries})),
        "megabytes": round(found.header.size / 1e6, 3),
        "changes": [
            {
                "component": pair.component,
                "module": pair.module,
                "rank": pair.rank,
                "alpha": alphas[pair],
                "inputs": list(pair.inputs),
                "outputs": pair.outputs,
            }
            for pair in found.pairs
        ],
    }


def _claims(found: AdapterFile) -> dict[str, str]:
    """Returns the base model that the file names, which is shown and never opened."""
    claims = {name: printable(found.header.metadata[name]) for name in _CLAIMS if name in found.header.metadata}
    named = {settings.base_model for settings in found.settings.values() if settings.base_model}
    return claims | ({"base_model_name_or_path": printable(", ".join(sorted(named)))} if named else {})


def _counted(values: Iterable[object]) -> dict[str, int]:
    """Returns how many modules have each value, the commonest first."""
    return {str(value): count for value, count in Counter(values).most_common()}
