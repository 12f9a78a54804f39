"""Which image goes with which prompt: by the names of files where they are given, by order where they are not."""

import logging
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath

from diffcore.data.order import by_number, is_numbered, numbers
from diffcore.data.prompts import PromptSet
from diffcore.errors import UserError, printable

_LOG = logging.getLogger(__name__)
_FILE_COLUMNS = ("file_name", "filename", "file", "image", "image_file", "image_path", "path")
# From the strictest to the loosest way in which a cell can mean a file.
_READINGS: tuple[Callable[[PurePosixPath], str], ...] = (
    str,
    lambda path: str(path.with_suffix("")),
    lambda path: path.name,
    lambda path: path.stem,
)


def places_of_prompts(prompts: PromptSet, names: Sequence[str]) -> tuple[int, ...]:
    """Returns for each image the index of its prompt; -1 for none, which a warning counts.

    A column `file_name` (or `filename`, `file`, `image`, `image_file`, `image_path`, `path`) says which file a line is
    about: by path, by path without suffix, by name, or by name without suffix, the first of these that fits. Without
    one, prompts and images go in step, as many images for each prompt, one after the other: by folder where there is
    one folder for each prompt, else in the order of the numbers in their names.

    Args:
        prompts: As read.
        names: Of all images of the set, readable or not, relative to its folder.

    Raises:
        UserError: Images and prompts do not go together, or more than one way to pair them fits.
    """
    columns = {name.strip().lower(): cells for name, cells in prompts.columns.items()}
    column = next((columns[name] for name in _FILE_COLUMNS if name in columns), None)
    places = _by_order(prompts, names) if column is None else _by_column(prompts, column, names)
    shown = printable(prompts.path.name)
    alone = [name for name, place in zip(names, places, strict=True) if place < 0]
    if alone:
        _LOG.warning("%s has no prompt for %d images, such as %s", shown, len(alone), printable(alone[0]))
    unused = len(prompts) - len(set(places) - {-1})
    if unused:
        _LOG.warning("%s has %d prompts of no image", shown, unused)
    return places


def _by_column(prompts: PromptSet, column: Sequence[str], names: Sequence[str]) -> tuple[int, ...]:
    shown = printable(prompts.path.name)
    cells = [(place, PurePosixPath(cell.replace("\\", "/"))) for place, cell in enumerate(column) if cell.strip()]
    for reading in _READINGS:
        wanted: dict[str, list[int]] = {}
        for place, path in cells:
            wanted.setdefault(reading(path), []).append(place)
        keys = [reading(PurePosixPath(name)) for name in names]
        if wanted.keys().isdisjoint(keys):
            continue
        owner: dict[str, str] = {}
        for key, name in zip(keys, names, strict=True):
            if key in wanted and owner.setdefault(key, name) != name:
                raise UserError(
                    f"{shown} says {printable(key)}, which may be {printable(owner[key])} or {printable(name)}; "
                    "give the path from the folder of images on"
                )
            lines = wanted.get(key, [])
            if len({prompts.prompts[place] for place in lines}) > 1:
                raise UserError(
                    f"{shown} gives {printable(name)} different prompts on lines {prompts.lines[lines[0]]} and "
                    f"{prompts.lines[lines[1]]}; keep one"
                )
        return tuple(wanted[key][0] if key in wanted else -1 for key in keys)
    raise UserError(f"{shown} names none of the images, such as {printable(names[0])}; check its column of files")


def _by_order(prompts: PromptSet, names: Sequence[str]) -> tuple[int, ...]:
    shown, count = printable(prompts.path.name), len(prompts)
    if prompts.skipped:
        line, reason = prompts.skipped[0]
        raise UserError(
            f"{shown} line {line} {reason}, and prompts go with images by order; correct it, or add a column file_name"
        )
    folders = [str(PurePosixPath(name).parent) for name in names]
    if len(set(folders)) == count > 1:
        place = {folder: n for n, folder in enumerate(_ordered(sorted(set(folders)), shown))}
        return tuple(place[folder] for folder in folders)
    if len(names) % count:
        raise UserError(
            f"{len(names)} images do not go with the {count} prompts of {shown}; give as many images for each "
            "prompt, or a column file_name"
        )
    each = len(names) // count
    ordered = _ordered(names, shown)
    if each > 1:
        _require_prompts_first(ordered, each, shown)
    place = {name: index // each for index, name in enumerate(ordered)}
    return tuple(place[name] for name in names)


def _ordered(names: Sequence[str], shown: str) -> list[str]:
    """Returns names in the order of their numbers; refuses names for which that order is not clearly meant."""
    ordered, as_text = by_number(names), sorted(names)
    if ordered == as_text:
        return ordered
    first = next(n for n, (ours, text) in enumerate(zip(ordered, as_text, strict=True)) if ours != text)
    if not is_numbered([name.rpartition(".")[0] or name for name in names]):
        raise UserError(
            f"the order of images is unclear: {printable(ordered[first])} or {printable(as_text[first])} may be number "
            f"{first + 1}; name the images in {shown}, in a column file_name"
        )
    _LOG.warning(
        "images go with prompts in the order of their numbers: %s before %s",
        printable(ordered[first]),
        printable(as_text[first]),
    )
    return ordered


def _require_prompts_first(ordered: Sequence[str], each: int, shown: str) -> None:
    """Refuses images that are numbered by sample first, by prompt second: they are in step with no list of prompts."""
    found = [numbers(name) for name in ordered]
    if len({len(row) for row in found}) > 1:
        return
    counts = [count for column in zip(*found, strict=True) if (count := len(set(column))) > 1]
    if counts[:2] == [each, len(ordered) // each] and each != len(ordered) // each:
        raise UserError(
            f"{printable(ordered[0])}, {printable(ordered[1])} and so on look numbered by sample first, by prompt "
            f"second; name the images in {shown}, in a column file_name"
        )
