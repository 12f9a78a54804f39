"""Results as JSON lines: one object per prompt."""

from pathlib import Path

from diffcore.errors import CorruptArtifactError, printable
from diffcore.io import files
from diffcore.io.jsonfile import json_line, write_text
from diffcore.io.strictjson import StrictError, parse
from nemo_localize.results import CaptionResult, Results

FILE = "results.jsonl"


def write_results(path: Path, results: Results) -> Path:
    """Writes one JSON object per line, atomically, and returns the path of the file."""
    return write_text(path, "".join(json_line(result.to_json()) for result in results))


def read_results(path: Path) -> Results:
    """Reads what `write_results` wrote, in this version or an earlier one.

    Raises:
        CorruptArtifactError: A line is no result; names it.
    """
    path = Path(path)
    with files.explained(path, reading=True):
        lines = files.read(path).split(b"\n")
    results = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            results.append(CaptionResult.from_json(parse(line)))
        except (StrictError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CorruptArtifactError(
                f"{printable(path, 300)}, line {number}: no result ({printable(error)}); localize again"
            ) from error
    return Results(tuple(results))
