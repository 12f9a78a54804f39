"""Prompts from untrusted text, CSV and JSON-lines files: every row is used exactly as written, or reported.

One prompt is one line. A row that a quotation mark stretches over several lines is reported as a whole: far more often
a quotation mark was forgotten, so that rows would merge silently, than a prompt has line breaks.
"""

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from diffcore.data.files import UnreadableFileError
from diffcore.errors import UserError, printable
from diffcore.io.strictjson import StrictError, parse, read_limited

MAX_CHARACTERS = 10_000
MAX_BYTES = 2**29
COLUMNS = ("prompt", "caption", "text")  # whatever their case; the first that is there holds the prompts
_CAPTIONS = (".txt", ".caption")
_CONTROL = re.compile(r"[\x00-\x1f]")
_UNDECODED = re.compile(r"[\udc80-\udcff]")  # what `surrogateescape` makes of bytes that are not UTF-8
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_OTHER_UNICODE = (b"\xff\xfe", b"\xfe\xff")

Row = dict[str, str] | StrictError
"""The cells of a line by column, or why it has none."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts with the lines they stand on.

    Attributes:
        path: The file that was read.
        prompts: Prompts exactly as written; an empty string is the empty prompt.
        lines: Line of each prompt, the first line of the file being 1.
        columns: Cells of the other columns as text, by name, one per prompt; empty where a line has none.
        skipped: Number and reason of each line that could not be used.
        num_blank: Lines without anything on them.
    """

    path: Path
    prompts: tuple[str, ...]
    lines: tuple[int, ...]
    columns: Mapping[str, tuple[str, ...]]
    skipped: tuple[tuple[int, str], ...] = ()
    num_blank: int = 0

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def distinct(self) -> tuple[str, ...]:
        """The distinct prompts in order of their first appearance."""
        return tuple(dict.fromkeys(self.prompts))

    @cached_property
    def places(self) -> tuple[int, ...]:
        """Index in `distinct` of each prompt."""
        index = {prompt: place for place, prompt in enumerate(self.distinct)}
        return tuple(index[prompt] for prompt in self.prompts)

    @cached_property
    def sha256(self) -> str:
        """Digest of prompts, lines and other columns, whatever the format that held them."""
        content = [self.prompts, self.lines, sorted(self.columns.items())]
        return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about lines that were left out and prompts that occur more than once."""
        name = printable(self.path.name)
        found = [f"{name} line {line} {reason}; it is left out" for line, reason in self.skipped[:5]]
        if len(self.skipped) > 5:
            found.append(f"{name}: {len(self.skipped) - 5} more lines are left out")
        if self.num_blank:
            found.append(f"{name}: left out {self.num_blank} blank line{'s' * (self.num_blank > 1)}")
        repeated = [prompt for prompt, count in Counter(self.prompts).items() if count > 1]
        if repeated:
            found.append(f"{name} gives {len(repeated)} prompts more than once, such as {printable(repeated[0])!r}")
        return tuple(found)


def load_prompts(path: str | Path, *, strict: bool = False) -> PromptSet:
    """Reads prompts: a line each of a `.txt`, a row each of a `.csv` or `.tsv`, an object each of a `.jsonl`.

    Rows and objects have a column `prompt`, `caption` or `text`, in any case; CSV begins with a header, and its
    separator, a comma, semicolon or tab, is the one that finds such a column in it. Text is UTF-8, with or without a
    byte order mark, and lines end in LF or CRLF alone. Of a folder of images, the prompts are the `.txt` or `.caption`
    files beside images of the same name, with the image in the column `file_name`.

    Args:
        path: The file, whose suffix tells its format, or the folder.
        strict: Whether the first unusable line is an error; otherwise it is left out and listed in the result.

    Raises:
        UserError: There is no usable prompt, or the file has another format.
    """
    path = Path(path)
    shown = printable(path, 300)
    if path.is_dir():
        return _gathered(path, list(_beside_images(path)), strict)
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise UserError(f"{shown} is no file of prompts; give one that ends in {', '.join(_READERS)}")
    if not path.exists():
        raise UserError(f"{shown} does not exist; give a file of prompts")
    try:
        data = read_limited(path, MAX_BYTES)
        if data.startswith(_OTHER_UNICODE):
            raise StrictError("is UTF-16")
        rows = list(read(data.removeprefix(b"\xef\xbb\xbf")))
    except StrictError as error:
        raise UserError(f"{shown} {error}; save it as UTF-8 text, a prompt on each line") from None
    return _gathered(path, rows, strict)


def _gathered(path: Path, rows: Sequence[tuple[int, Row | None]], strict: bool) -> PromptSet:
    """Sorts rows into usable and unusable ones; None stands for a blank line."""
    usable: list[tuple[int, str, dict[str, str]]] = []
    skipped: list[tuple[int, str]] = []
    for line, row in rows:
        if row is None:
            continue
        try:
            usable.append((line, *_checked(row)))
        except StrictError as error:
            if strict:
                raise UserError(
                    f"{printable(path, 300)} line {line} {error}; correct it, or leave out `strict`"
                ) from None
            skipped.append((line, str(error)))
    if not usable:
        told = f": line {skipped[0][0]} {skipped[0][1]}" if skipped else ""
        raise UserError(f"{printable(path, 300)} holds no usable prompt{told}; give a file with a prompt on each line")
    names = dict.fromkeys(name for _, _, others in usable for name in others)
    return PromptSet(
        path,
        tuple(prompt for _, prompt, _ in usable),
        tuple(line for line, _, _ in usable),
        {name: tuple(others.get(name, "") for _, _, others in usable) for name in names},
        tuple(skipped),
        sum(row is None for _, row in rows),
    )


def _checked(row: Row) -> tuple[str, dict[str, str]]:
    """Returns the prompt of a row and its other cells."""
    if isinstance(row, StrictError):
        raise row
    column = _prompt_column(row)
    if column is None:
        raise StrictError(f"has no {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}")
    prompt = row[column]
    if len(prompt) > MAX_CHARACTERS:
        raise StrictError(f"has {len(prompt):,} characters; the limit is {MAX_CHARACTERS:,}")
    for cell in row.values():
        if _UNDECODED.search(cell):
            raise StrictError("is not UTF-8")
        if _SURROGATE.search(cell):
            raise StrictError("holds half of a character")
    if control := _CONTROL.search(prompt):
        raise StrictError(f"holds the control character {printable(control[0])}")
    return prompt, {name: cell for name, cell in row.items() if name != column}


def _prompt_column(names: Iterable[str]) -> str | None:
    by_word = {name.strip().lower(): name for name in reversed(list(names))}
    return next((by_word[word] for word in COLUMNS if word in by_word), None)


def _beside_images(folder: Path) -> Iterator[tuple[int, Row]]:
    """Yields the caption of each image that has one, numbered by image.

    Raises:
        UserError: No image has one; files of the folder that may hold prompts are named.
    """
    from diffcore.data.source import list_images

    source = list_images(folder)
    captions: dict[str, list[str]] = {}
    for name in source.others:
        if PurePosixPath(name).suffix.lower() in _CAPTIONS:
            captions.setdefault(str(PurePosixPath(name).with_suffix("")), []).append(name)
    found = [captions.get(str(PurePosixPath(image).with_suffix("")), []) for image in source.names]
    if not any(found):
        files = [printable(name) for name in source.others if PurePosixPath(name).suffix.lower() in _READERS]
        hint = f"give the file of prompts itself, such as {files[0]}" if files else "give a file of prompts"
        raise UserError(f"{printable(folder, 300)} has no {' or '.join(_CAPTIONS)} file beside its images; {hint}")
    for number, (image, names) in enumerate(zip(source.names, found, strict=True), start=1):
        try:
            texts = {_caption(source.files.read(name)) for name in names}
        except UnreadableFileError as error:
            yield number, StrictError(f"({printable(names[0])}) {error}")
            continue
        if len(texts) > 1:
            yield number, StrictError(f"has the captions {' and '.join(map(printable, names))}, which differ")
        elif texts:
            yield number, {"prompt": texts.pop(), "file_name": image}


def _caption(data: bytes) -> str:
    return data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape").strip()


def _lines(data: bytes) -> list[str]:
    """Splits text at line feeds alone; `str.splitlines` would break captions at rarer separators too."""
    lines = data.decode("utf-8", errors="surrogateescape").split("\n")
    return [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]


def _read_text(data: bytes) -> Iterator[tuple[int, Row | None]]:
    for number, line in enumerate(_lines(data), start=1):
        yield number, {"prompt": line} if line.strip() else None


def _read_json_lines(data: bytes) -> Iterator[tuple[int, Row | None]]:
    for number, line in enumerate(_lines(data), start=1):
        yield number, _object(line) if line.strip() else None


def _object(line: str) -> Row:
    try:
        value = parse(line.encode("utf-8", errors="surrogateescape"), parse_int=int)
    except StrictError as error:
        return error
    if not isinstance(value, dict):
        return StrictError(f"holds a {type(value).__name__}, not an object")
    column = _prompt_column(value)
    if column is not None and not isinstance(value[column], str):
        return StrictError(f"has a {type(value[column]).__name__} as its {printable(column)}, not text")
    return {name: item if isinstance(item, str) else _text(item) for name, item in value.items()}


def _text(value: object) -> str:
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def _read_csv(data: bytes) -> Iterator[tuple[int, Row | None]]:
    lines = _lines(data)
    first = next((number for number, line in enumerate(lines) if line.strip()), None)
    if first is None:
        raise StrictError("is empty")
    separator, header = _header(lines[first])
    records = csv.reader((line + "\n" for line in lines), delimiter=separator, strict=True)
    end = 0
    while True:
        try:
            cells = next(records)
        except StopIteration:
            return
        except csv.Error as error:
            cells = StrictError(f"is no row ({printable(error)})")
        begin, end = end + 1, records.line_num
        if end > begin:
            cells = StrictError(f"has a quotation mark that reaches to line {end}")
        if not lines[begin - 1].strip(" "):  # a line of tabs is a row of empty cells
            yield begin, None
        elif begin > first + 1:
            yield begin, _named(header, cells)


def _header(line: str) -> tuple[str, list[str]]:
    """Returns the separator and the names of the columns; of several that fit, the one with the most columns."""
    found = []
    for separator in ",;\t":
        try:
            names = next(csv.reader([line], delimiter=separator, strict=True))
        except csv.Error:
            continue
        if _prompt_column(names) is not None:
            found.append((separator, names))
    if not found:
        raise StrictError(
            f"has no column {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]} in its first line {printable(line)!r}"
        )
    separator, names = max(found, key=lambda pair: len(pair[1]))
    names = [name or f"column {place}" for place, name in enumerate(names, start=1)]
    if len(set(names)) < len(names):
        raise StrictError(f"names a column of {printable(line)!r} twice")
    return separator, names


def _named(header: Sequence[str], cells: list[str] | StrictError) -> Row:
    if isinstance(cells, StrictError):
        return cells
    if len(cells) != len(header):
        return StrictError(f"has {len(cells)} cells, the header {len(header)}")
    return dict(zip(header, cells, strict=True))


_READERS = {".txt": _read_text, ".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_json_lines}
