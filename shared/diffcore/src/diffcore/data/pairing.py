"""Pairing images with prompts: by file names where the prompts give them, else by order."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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
    """Returns the index of each image's prompt; -1 without one, and a warning with the count of such images.

    A column `file_name` (or `filename`, `file`, `image`, `image_file`, `image_path`, `path`) names the image of each
    prompt: by path, by path without suffix, by name, or by name without suffix, the first of these that fits. So does
    any other column that holds the name of an image with its suffix. Without such a column, prompts and images are
    paired in order, with equally many images per prompt: by folder where there is one folder for each prompt, else in
    the order of the numbers in their names.

    Args:
        prompts: The prompts of one file, with its other columns.
        names: File names of all images of the set, readable or not, relative to its folder.

    Raises:
        UserError: Images and prompts do not go together, or more than one way to pair them fits.
    """
    columns = {name.strip().lower(): cells for name, cells in prompts.columns.items()}
    column = next((columns[name] for name in _FILE_COLUMNS if name in columns), _naming(columns, names))
    places = _by_order(prompts, names) if column is None else _by_column(prompts, column, names)
    shown = printable(prompts.path.name)
    alone = [name for name, place in zip(names, places, strict=True) if place < 0]
    if alone:
        told = f"{len(alone)} image{'s' * (len(alone) > 1)}, such as {printable(alone[0])}"
        _LOG.warning("%s has no prompt for %s", shown, told)
    unused = len(prompts) - len(set(places) - {-1})
    if unused:
        _LOG.warning("%s has %d prompt%s of no image", shown, unused, "s" * (unused > 1))
    return places


def _path(cell: str) -> PurePosixPath:
    return PurePosixPath(cell.strip().replace("\\", "/"))


def _naming(columns: Mapping[str, Sequence[str]], names: Sequence[str]) -> Sequence[str] | None:
    """Returns the first column that holds the name of an image with its suffix; None if there is none."""
    files = {PurePosixPath(name).name for name in names}
    return next((cells for cells in columns.values() if any(_path(cell).name in files for cell in cells)), None)


def _by_column(prompts: PromptSet, column: Sequence[str], names: Sequence[str]) -> tuple[int, ...]:
    shown = printable(prompts.path.name)
    cells = [(place, _path(cell)) for place, cell in enumerate(column) if cell.strip()]
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
        of_folder = {folder: n for n, folder in enumerate(_ordered(sorted(set(folders)), shown))}
        place = {name: of_folder[folder] for name, folder in zip(names, folders, strict=True)}
    elif len(names) % count:
        raise UserError(
            f"{len(names)} images do not go with the {count} prompts of {shown}; give as many images for each "
            "prompt, or a column file_name"
        )
    else:
        each = len(names) // count
        ordered = _ordered(names, shown) if count > 1 else names
        place = {name: index // each for index, name in enumerate(ordered)}
    _require_prompts_first(by_number(names), place, count, shown)
    _require_no_other_order(prompts, place)
    return tuple(place[name] for name in names)


def _ordered(names: Sequence[str], shown: str) -> list[str]:
    """Returns names in the order of their numbers; refuses names for which that order is not clearly meant."""
    ordered, as_text = by_number(names), sorted(names)
    numbered = is_numbered([name.rpartition(".")[0] or name for name in names])
    if ordered == as_text:
        if not numbered:
            _LOG.warning("images go with prompts in the order of their names, %s first", printable(ordered[0]))
        return ordered
    first = next(n for n, (ours, text) in enumerate(zip(ordered, as_text, strict=True)) if ours != text)
    if not numbered:
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


def _require_prompts_first(ordered: Sequence[str], place: Mapping[str, int], count: int, shown: str) -> None:
    """Refuses images that are numbered by sample or seed first, by prompt second: the order is not that of prompts."""
    found = [numbers(name) for name in ordered]
    each, rest = divmod(len(ordered), count)
    if rest or len({len(row) for row in found}) > 1:
        return
    columns = list(zip(*found, strict=True))
    varying = [index for index, column in enumerate(columns) if len(set(column)) > 1]
    if not varying:
        return
    first, *others = (columns[index] for index in varying)
    places = [place[name] for name in ordered]
    before = re.split(r"\d+", ordered[0])[varying[0]]
    doubtful = not _counts(first, count, each) or before.lower().rstrip(" _=.-").endswith("seed")
    second = any(_counts(other, count, each) and [n - min(other) for n in other] != places for other in others)
    shape = [len(set(columns[index])) for index in varying[:2]]
    if (doubtful and second) or (shape == [each, count] and each != count):
        raise UserError(
            f"{printable(ordered[0])}, {printable(ordered[1])} and so on look numbered by sample first, by prompt "
            f"second; name the images in {shown}, in a column file_name"
        )


def _counts(column: Sequence[int], count: int, each: int) -> bool:
    """Whether numbers count something of which there are `count`, `each` times."""
    return max(column) - min(column) == count - 1 and set(Counter(column).values()) == {each}


def _require_no_other_order(prompts: PromptSet, place: Mapping[str, int]) -> None:
    """Refuses a column that names every image without its suffix, as numbers do, in another order than theirs."""
    for title, cells in prompts.columns.items():
        told = {cell.strip(): line for line, cell in enumerate(cells)}
        stems = {name: PurePosixPath(name).stem for name in place}
        if all(stem in told for stem in stems.values()) and any(told[stems[name]] != place[name] for name in place):
            raise UserError(
                f"the column {printable(title)} of {printable(prompts.path.name)} names the images in another order "
                "than their own; call it file_name if it says which prompt is whose, or leave it out"
            )
