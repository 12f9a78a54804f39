"""The results table of the published code, for whoever has tables of it, or tools that read them.

One row per caption, separated by semicolons; neurons are the text of a list with one list of channels per value layer,
shallowest first. What that code calls SSIM is its multi-scale form. It has no statuses; `results.jsonl` has.

References:
    Code of Hintersdorf, Struppek et al. 2024: github.com/ml-research/localizing_memorization_in_diffusion_models.
"""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffcore.data.prompts import load_prompts
from diffcore.errors import IncompatibleModelError, UserError, printable
from diffcore.hooks import Site
from diffcore.io.jsonfile import write_text
from diffcore.io.strictjson import StrictError, parse
from nemo_localize.neurons import NO_NEURONS, NeuronSet
from nemo_localize.results import CaptionResult
from nemo_localize.sites import ValueSites

COLUMNS = ("Caption", "URL", "Initial Neurons", "Initial SSIM", "Refined Neurons", "Refined SSIM")

PUBLISHED_SITES = ValueSites(
    tuple(
        Site(f"{block}.transformer_blocks.0.attn2.to_v")
        for block in (
            *(f"down_blocks.{level}.attentions.{place}" for level in range(3) for place in range(2)),
            "mid_block.attentions.0",
        )
    ),
    (320, 320, 640, 640, 1280, 1280, 1280),
)
"""The seven layers of Stable Diffusion 1.x and 2.x, of which the published tables are (paper, section 3)."""


@dataclass(frozen=True)
class AuthorsRow:
    """One caption of the table.

    Attributes:
        caption: Caption as written, on one line.
        url: Address of its training image; may be empty.
        initial: Neurons of the selected candidate set; None where the cell is empty.
        initial_ssim: Score with these ablated; None where the cell is empty.
        refined: Neurons left after refinement; None where the cell is empty.
        refined_ssim: Score with these ablated.
    """

    caption: str
    url: str = ""
    initial: NeuronSet | None = None
    initial_ssim: float | None = None
    refined: NeuronSet | None = None
    refined_ssim: float | None = None

    @classmethod
    def of(cls, result: CaptionResult, url: str = "") -> "AuthorsRow":
        """Returns the row of a result, with neurons in every cell of neurons: readers of these tables expect them.

        Captions that are not memorised have no neurons and scores of 0, as published. Those that were not refined have
        no refined neurons and the score of ablating none, 1. Those that failed have no neurons and no scores.
        """
        if result.status == "error":
            return cls(result.prompt, url, NO_NEURONS, None, NO_NEURONS, None)
        if result.status == "not_memorised":
            return cls(result.prompt, url, NO_NEURONS, 0.0, NO_NEURONS, 0.0)
        if result.refined is None:
            return cls(result.prompt, url, result.initial, result.score_initial, NO_NEURONS, 1.0)
        return cls(result.prompt, url, result.initial, result.score_initial, result.refined, result.score_refined)


def write_authors_table(path: Path, rows: Sequence[AuthorsRow], sites: ValueSites) -> Path:
    """Writes rows, atomically.

    Args:
        path: Path of the `.csv` file.
        rows: Rows in the order of the table.
        sites: Value layers that the lists of channels follow.

    Raises:
        IncompatibleModelError: A neuron is not in these layers.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=";", lineterminator="\r\n")
    writer.writerow(COLUMNS)
    for row in rows:
        initial, refined = (_listed(neurons, sites) for neurons in (row.initial, row.refined))
        writer.writerow([row.caption, row.url, initial, row.initial_ssim, refined, row.refined_ssim])
    return write_text(Path(path), text.getvalue())


def read_authors_table(path: Path, sites: ValueSites) -> list[AuthorsRow]:
    """Reads a table that `write_authors_table` or the published code wrote; a leading column of row numbers may stay.

    Neurons that the published code lists twice count once.

    Args:
        path: Path of the `.csv` file.
        sites: Value layers of the model that the table belongs to.

    Raises:
        IncompatibleModelError: It lists other layers, or neurons that these have not.
        UserError: It is no such table; names the line.
    """
    table = load_prompts(path, strict=True)
    if missing := [name for name in COLUMNS[1:] if name not in table.columns]:
        raise UserError(f"{printable(path, 300)} has no column {missing[0]!r}; the table has {', '.join(COLUMNS)}")
    cells = zip(table.prompts, *(table.columns[name] for name in COLUMNS[1:]), strict=True)
    rows = []
    for line, row in zip(table.lines, cells, strict=True):
        try:
            rows.append(_row(row, sites))
        except (IncompatibleModelError, StrictError, ValueError) as error:
            kind = IncompatibleModelError if isinstance(error, IncompatibleModelError) else UserError
            raise kind(f"{printable(path, 300)} line {line}: {error}") from None
    return rows


def _row(cells: Sequence[str], sites: ValueSites) -> AuthorsRow:
    caption, url, initial, initial_ssim, refined, refined_ssim = cells
    return AuthorsRow(
        caption, url, _neurons(initial, sites), _score(initial_ssim), _neurons(refined, sites), _score(refined_ssim)
    )


def _listed(neurons: NeuronSet | None, sites: ValueSites) -> str:
    if neurons is None:
        return ""
    numbers = sites.numbers(neurons)  # refuses what these layers have not
    return str([[number - span.start for number in span if number in numbers] for span in sites.spans])


def _neurons(cell: str, sites: ValueSites) -> NeuronSet | None:
    if not cell:
        return None
    layers = parse(cell.encode())
    if not isinstance(layers, list) or any(not isinstance(layer, list) for layer in layers):
        raise ValueError(f"{printable(cell)} is no list of lists of channels; correct it")
    if len(layers) != len(sites.sites):
        raise IncompatibleModelError(
            f"neurons of {len(layers)} value layers, where this model has {len(sites.sites)}; use the table's own model"
        )
    neurons = NeuronSet.from_json({site.module: layer for site, layer in zip(sites.sites, layers, strict=True)})
    sites.numbers(neurons)
    return neurons


def _score(cell: str) -> float | None:
    if not cell:
        return None
    try:
        score = float(cell)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(f"a score is {printable(cell)}; scores are from 0 to 1")
    return score
