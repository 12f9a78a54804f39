"""The words of reports: titles of pages and tables, and what columns are called there."""

from collections.abc import Mapping, Sequence
from typing import Any

TITLES = {
    "demo": "Which activations of a diffusion model make good features?",
    "score": "All activations, ranked without labels",
    "select": "A set of activations under a budget",
    "evaluate": "How good the features are",
    "correspond": "Which places of two images belong together?",
    "probe": "What a simple classifier reads from the features",
    "extract": "The extracted features",
    "table-stored": "What was stored",
    "table-scores": "Scores",
    "table-sets": "Beside other sets",
    "table-copies": "Near copies",
    "table-tasks": "Measured with labels",
    "table-paper": "Against the paper's tables",
    "table-correlations": "How well scores without labels agree with labels",
}
SCORES = {
    "self_match": "share of points found again in a moved copy",
    "fisher_rank": "log Fisher score plus log effective rank",
    "fisher": "Fisher score of content against noise",
    "information": "information about content (nats)",
    "effective_rank": "effective rank of content",
}
_COLUMNS = {
    **{name: label for name, label in SCORES.items() if name not in ("self_match", "effective_rank")},
    "self_match": "points found again",
    "effective_rank": "effective rank",
    "position_share": "position share",
    "noise_leak": "noise leak",
    "granularity": "cycles per image",
    "cost": "share of a pass",
    "miou": "mean IoU",
    "pck": "PCK@0.1",
    "num_channels": "channels",
}


def worded(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows of a table with the names that its columns have on a page.

    Args:
        rows: Rows with the names of the library.
    """
    return [{_COLUMNS.get(name, name): value for name, value in row.items()} for row in rows]
