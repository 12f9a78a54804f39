"""Neurons from files: our results, a manifest, a plain object, or the published code's table."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from diffcore.errors import CorruptArtifactError, IncompatibleModelError, UserError, printable
from diffcore.io.jsonfile import read_trusted
from nemo_localize.files.published_table import PUBLISHED_SITES, AuthorsRow, read_authors_table
from nemo_localize.files.results import FILE as RESULTS
from nemo_localize.files.results import read_results
from nemo_localize.neurons import NO_NEURONS, NeuronSet
from nemo_localize.sites import value_sites

if TYPE_CHECKING:
    from torch import nn


def read_neurons(
    path: Path, *, backbone: "nn.Module | None" = None, failed: bool = False
) -> tuple[NeuronSet, dict[str, NeuronSet]]:
    """Returns the neurons to ablate together, and which of them belong to which caption where the file says so.

    Args:
        path: Run folder of localize, audit or export, its `results.jsonl`, a JSON object with `neurons`, such as a
            manifest or a `GlobalEdit`, a plain object from module name to channels, or a table of the published code
            (`.csv`).
        backbone: Network that a table belongs to, which lists channels by the number of their layer; by default the
            layers are those of Stable Diffusion 1.x and 2.x.
        failed: Include prompts whose score never fell to the threshold, with what refinement left of their candidates,
            as the published code does.

    Raises:
        UserError: The path holds none of these.
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
        results = read_results(path)
        return results.neurons, results.by_caption(failed=failed)
    if path.suffix == ".csv":
        rows = _table(path, backbone)
        captions = {row.caption: row.refined for row in rows if row.refined}
        return NO_NEURONS.union(*captions.values()), captions
    content = read_trusted(path)
    captions = content.get("captions", {})
    if isinstance(captions, list):  # a `GlobalEdit` lists scores here; its neurons belong to all prompts together
        captions = {}
    try:
        return (
            NeuronSet.from_json(content.get("neurons", content)),
            {prompt: NeuronSet.from_json(value) for prompt, value in captions.items()},
        )
    except (ValueError, AttributeError) as error:
        raise CorruptArtifactError(f"{printable(path, 300)} holds no neurons: {error}") from error


def _table(path: Path, backbone: "nn.Module | None") -> list[AuthorsRow]:
    """Reads a table of a network's searched layers, or of these and those of its up blocks."""
    if backbone is None:
        return read_authors_table(path, PUBLISHED_SITES)
    try:
        return read_authors_table(path, value_sites(backbone))
    except IncompatibleModelError:
        try:
            return read_authors_table(path, value_sites(backbone, up=True))
        except IncompatibleModelError:
            pass
        raise


def most_frequent(captions: Mapping[str, NeuronSet], count: int) -> NeuronSet:
    """Returns the neurons that most prompts have in common, as many as asked for; ties go to shallower layers.

    Raises:
        UserError: The captions have fewer, or no caption has neurons of its own.
    """
    if not captions:
        raise UserError("the neurons are not told by caption, so none is frequent; give a run of localize or a table")
    found = Counter(neuron for neurons in captions.values() for neuron in neurons)
    if not 0 < count <= len(found):
        raise UserError(f"`most_frequent` is {count}; the captions have {len(found)} different neurons")
    ranked = sorted(found, key=lambda neuron: (-found[neuron], neuron[0]))
    channels: dict[str, list[int]] = {}
    for name, index in ranked[:count]:
        channels.setdefault(name, []).append(index)
    return NeuronSet.of(channels)
