"""Neurons from files: our results, a manifest, a plain object, or the published code's table."""

from pathlib import Path

from diffcore.errors import CorruptArtifactError, UserError, printable
from diffcore.jsonfile import read_object
from nemo_localize.authors_table import PUBLISHED_SITES, read_authors_table
from nemo_localize.neurons import NO_NEURONS, NeuronSet
from nemo_localize.results import Results

RESULTS = "results.jsonl"


def read_neurons(path: Path) -> tuple[NeuronSet, dict[str, NeuronSet]]:
    """Returns the neurons to switch off together, and which of them belong to which caption where the file says so.

    Args:
        path: A run folder of localize, audit or apply, its `results.jsonl`, a JSON object with `neurons`, such as a
            manifest or what a global edit tells of itself, a plain object from module name to channels, or a table of
            the published code (`.csv`), which is of SD 1.x and 2.x alone.

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
        rows = read_authors_table(path, PUBLISHED_SITES)
        captions = {row.caption: row.refined for row in rows if row.refined}
        return NO_NEURONS.union(*captions.values()), captions
    content = read_object(path)
    captions = content.get("captions", {})
    if isinstance(captions, list):  # a global edit: how captions fare, while its neurons are of all of them together
        captions = {}
    try:
        return (
            NeuronSet.from_json(content.get("neurons", content)),
            {prompt: NeuronSet.from_json(value) for prompt, value in captions.items()},
        )
    except (ValueError, AttributeError) as error:
        raise CorruptArtifactError(f"{printable(path, 300)} holds no neurons: {error}") from error


def by_caption(results: Results) -> dict[str, NeuronSet]:
    """Returns the refined neurons of the localised captions."""
    return {r.prompt: r.refined for r in results.distinct() if r.status == "localised" and r.refined is not None}
