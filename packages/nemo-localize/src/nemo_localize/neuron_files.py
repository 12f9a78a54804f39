"""Neurons from files: our results, a manifest, a plain object, or the published code's table; which is written too.

That table has `;` between cells and the columns Caption, URL, Initial Neurons, Initial SSIM, Refined Neurons, Refined
SSIM; neurons are the text of a list of lists, one for each of the seven layers. Imports no torch.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffcore.errors import CorruptArtifactError, UserError, printable
from diffcore.jsonfile import read_object, write_text
from nemo_localize.neurons import NO_NEURONS, NeuronSet
from nemo_localize.results import CaptionResult, Results

RESULTS = "results.jsonl"
_COLUMNS = ("Caption", "URL", "Initial Neurons", "Initial SSIM", "Refined Neurons", "Refined SSIM")
_PUBLISHED_LAYERS = tuple(
    f"{block}.attentions.{place}.transformer_blocks.0.attn2.to_v"
    for block, place in [(f"down_blocks.{level}", place) for level in range(3) for place in range(2)]
    + [("mid_block", 0)]
)


def read_neurons(path: Path) -> tuple[NeuronSet, dict[str, NeuronSet]]:
    """Returns the neurons to switch off together, and which of them belong to which caption where the file says so.

    Args:
        path: A run folder of localize or audit, its `results.jsonl`, a manifest or another JSON object with `neurons`,
            a plain object from module name to channels, or a table of the published code (`.csv`).

    Raises:
        UserError: There is nothing of these.
        CorruptArtifactError: The file is damaged.
    """
    path = Path(path)
    if path.is_dir():
        found = next(
            (path / name for name in ("neurons.json", RESULTS, "manifest.json") if (path / name).exists()), None
        )
        if found is None:
            raise UserError(f"{printable(path, 300)} holds no neurons; give a run of localize or audit, or a file")
        path = found
    if not path.is_file():
        raise UserError(f"{printable(path, 300)} does not exist; give a run of localize, or a file of neurons")
    if path.suffix == ".jsonl":
        results = Results.read_jsonl(path)
        return results.union(), by_caption(results)
    if path.suffix == ".csv":
        captions = read_authors_table(path)
        return NO_NEURONS.union(*captions.values()), captions
    content = read_object(path)
    try:
        captions = {prompt: NeuronSet.from_json(value) for prompt, value in content.get("captions", {}).items()}
        return NeuronSet.from_json(content.get("neurons", content)), captions
    except (ValueError, AttributeError) as error:
        raise CorruptArtifactError(f"{printable(path, 300)} holds no neurons: {error}") from error


def by_caption(results: Results) -> dict[str, NeuronSet]:
    """Returns the refined neurons of the localised captions."""
    return {r.prompt: r.refined for r in results.distinct() if r.status == "localised" and r.refined is not None}


def write_authors_table(
    path: Path, results: Results, modules: Sequence[str], urls: Mapping[str, str] | None = None
) -> Path:
    """Writes results as the published code does: memorised captions alone, a row each.

    Args:
        path: Where.
        results: Of localisation.
        modules: Names of the searched layers in order.
        urls: Of training images, by caption.
    """
    text = io.StringIO()
    writer = csv.writer(text, delimiter=";", lineterminator="\n")
    writer.writerow(_COLUMNS)
    for result in results.distinct():
        if result.status in ("localised", "not_localised"):
            writer.writerow(_row(result, modules, (urls or {}).get(result.prompt, "")))
    return write_text(path, text.getvalue())


def read_authors_table(path: Path) -> dict[str, NeuronSet]:
    """Returns the refined neurons by caption from a table of the published code, which is of SD 1.x and 2.x alone.

    Raises:
        CorruptArtifactError: A row is none of such a table; names its number.
    """
    found: dict[str, NeuronSet] = {}
    with Path(path).open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter=";")
        try:
            for row in rows:
                layers = json.loads(row["Refined Neurons"])
                found[row["Caption"]] = NeuronSet.of(dict(zip(_PUBLISHED_LAYERS, layers, strict=True)))
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise CorruptArtifactError(
                f"{printable(path, 300)}, line {rows.line_num}: no row of the published code's table "
                f"({printable(error)}); its columns are {', '.join(_COLUMNS)}"
            ) from error
    return found


def _row(result: CaptionResult, modules: Sequence[str], url: str) -> list[Any]:
    # What was not refined has, as in the published code, its initial neurons in both places.
    refined = result.initial if result.refined is None else result.refined
    score = result.score_initial if result.score_refined is None else result.score_refined
    return [
        result.prompt,
        url,
        _listed(result.initial, modules),
        result.score_initial,
        _listed(refined, modules),
        score,
    ]


def _listed(neurons: NeuronSet, modules: Sequence[str]) -> str:
    return json.dumps([list(neurons[module]) for module in modules])
