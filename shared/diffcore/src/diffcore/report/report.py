"""A report in one HTML file: the answer in a sentence, figures, numbers, and how they were made."""

import base64
import io
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from diffcore.io import files, jsonfile
from diffcore.report.figures import image_grid
from diffcore.report.style import DPI
from diffcore.run import Run

_LOG = logging.getLogger(__name__)
_WARN_BYTES, _SHRINK_BYTES = 8_000_000, 25_000_000
_SMALL_SIDE = 256  # photographs above it are stored as JPEG; too large a report shrinks all images to it
_ROWS = 200
_CSS_DPI = 96
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class _Picture:
    data: bytes
    caption: str
    photograph: bool = False


class Report:
    """Collects blocks in order and writes them as one HTML file without scripts; every method returns the report.

    All text is taken literally: markup in it is shown, not obeyed.
    """

    def __init__(self, title: str, run: Run | None = None) -> None:
        """Starts a report.

        Args:
            title: The question that the report answers.
            run: The run it is about, for the section on how it was made; until it is finished, the answer says so.
        """
        self._title = title
        self._run = run
        self._answer = ""
        self._blocks: list[dict[str, Any] | _Picture] = []

    def answer(self, sentence: str) -> "Report":
        """Sets the sentence at the top, in large type."""
        self._answer = sentence
        return self

    def numbers(self, numbers: Mapping[str, float | str]) -> "Report":
        """Adds a row of key figures, each under its name."""
        pairs = [(name, _cell(value)) for name, value in numbers.items()]
        return self._add(kind="numbers", numbers=pairs)

    def section(self, heading: str) -> "Report":
        """Starts a section."""
        number = sum(isinstance(block, dict) and block["kind"] == "section" for block in self._blocks) + 1
        return self._add(kind="section", heading=heading, anchor=f"section-{number}")

    def text(self, *paragraphs: str) -> "Report":
        """Adds paragraphs."""
        for paragraph in paragraphs:
            self._add(kind="text", text=paragraph)
        return self

    def points(self, *items: str) -> "Report":
        """Adds a list of points."""
        return self._add(kind="points", items_=items)

    def figure(self, figure: Figure | Path, caption: str) -> "Report":
        """Adds a figure, or an image file such as `Run.figure` returns.

        Args:
            figure: A matplotlib figure or the path of a PNG.
            caption: Sentence that states n, seeds and intervals; screen readers read it too.
        """
        if isinstance(figure, Figure):
            data = io.BytesIO()
            figure.savefig(data, format="png", dpi=DPI, metadata={"Software": None})
            self._blocks.append(_Picture(data.getvalue(), caption))
        else:
            with files.explained(figure, reading=True):
                self._blocks.append(_Picture(files.read(figure), caption))
        return self

    def plot(self, name: str, figure: Figure, caption: str) -> "Report":
        """Adds a figure that the run keeps as `figures/NAME.png`; caption as in `figure`."""
        return self.figure(self._about.figure(name, figure), caption)

    def images(
        self,
        images: Float[Tensor, "b c h w"],
        caption: str,
        *,
        columns: int | None = None,
        row_labels: Sequence[str] = (),
        column_labels: Sequence[str] = (),
    ) -> "Report":
        """Adds a grid of images in [0, 1]; arguments as in `image_grid`."""
        grid = image_grid(images, columns=columns, row_labels=row_labels, column_labels=column_labels)
        self.figure(grid, caption)
        picture = self._blocks.pop()
        if isinstance(picture, _Picture):
            self._blocks.append(_Picture(picture.data, caption, photograph=max(images.shape[-2:]) > _SMALL_SIDE))
        return self

    def table(self, rows: Sequence[Mapping[str, Any]], caption: str = "") -> "Report":
        """Adds a table, a column per key; numbers to four digits, the first 200 rows.

        A column, except the first, with the same word in all rows is replaced by one line below the table. Where the
        page is narrow each row becomes a paragraph.
        """
        names = list(dict.fromkeys(name for row in rows for name in row))
        same = [(name, _cell(rows[0][name])) for name in names[1:] if _is_repeated([row.get(name) for row in rows])]
        names = [name for name in names if name not in dict(same)]
        columns = [(name, all(_is_number(row.get(name)) for row in rows)) for name in names]
        cells = [[_cell(row.get(name)) for name in names] for row in rows[:_ROWS]]
        return self._add(
            kind="table",
            caption=caption,
            columns=columns,
            rows=cells,
            same=same,
            cut=len(rows) if len(rows) > _ROWS else 0,
        )

    def kept_table(
        self, name: str, heading: str, worded: Callable[[Sequence[dict[str, Any]]], Sequence[Mapping[str, Any]]] = list
    ) -> "Report":
        """Adds a section with the table that `Run.keep_table` kept, where there is one.

        Args:
            name: Name of the table.
            heading: Heading of the section.
            worded: Puts the rows into words for people.
        """
        if self._about.has(f"table-{name}"):
            kept = self._about.load(f"table-{name}").fields
            self.section(heading).table(worded(kept["rows"]), kept["caption"])
        return self

    def save(self, path: Path | None = None) -> Path:
        """Writes the report and returns its path; the same content gives the same bytes.

        Args:
            path: File to write; by default `report.html` of the run.

        Raises:
            MachineError: The disk is full or failing.
        """
        if self._run is not None and not self._run.finished:
            self.answer("This run goes on; type its command again if it was interrupted.")
        path = self._about.folder / "report.html" if path is None else path
        text = self._html(shrink=False)
        if len(text) > _SHRINK_BYTES:
            text = self._html(shrink=True)
            _LOG.warning("the pictures of %s were shrunk: it would have had more than 25 MB", Path(path).name)
        if len(text) > _WARN_BYTES:
            _LOG.warning("%s has %.0f MB; mail and some browsers may refuse it", Path(path).name, len(text) / 1e6)
        return jsonfile.write_text(path, text)

    @property
    def _about(self) -> Run:
        if self._run is None:
            raise ValueError("the report is about no run; give it one")
        return self._run

    def _add(self, **block: Any) -> "Report":
        self._blocks.append(block)
        return self

    def _html(self, *, shrink: bool) -> str:
        blocks = [_embed(block, shrink) if isinstance(block, _Picture) else block for block in self._blocks]
        # autoescape is said aloud: it is off by default, and prompts are hostile text
        environment = Environment(
            autoescape=True, undefined=StrictUndefined, loader=PackageLoader("diffcore.report", ""), trim_blocks=False
        )
        return environment.get_template("template.html.j2").render(
            title=self._title,
            answer=self._answer,
            kind=self._run.record["command"] if self._run else "",
            blocks=blocks,
            sections=[block for block in blocks if block["kind"] == "section"],
            made=list(self._made()),
        )

    def _made(self) -> Iterable[tuple[str, str]]:
        if self._run is None:
            return
        record = self._run.record
        yield "Command", record["command"]
        yield "Made by", ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        if record["seed"] is not None:
            yield "Seed", str(record["seed"])
        for name, digest in record["inputs"].items():
            yield f"Input: {name}", f"sha256 {digest[:16]}…" if _SHA256.fullmatch(digest) else digest
        yield "Settings", ", ".join(f"{name} = {_cell(value)}" for name, value in record["config"].items())
        hardware = record["hardware"]
        yield "Hardware", hardware["gpu"] or f"{hardware['machine']} CPU, {hardware['cores']} cores"
        yield "Started", record["created"]


def _embed(picture: _Picture, shrink: bool) -> dict[str, Any]:
    """Returns the block of an image: its bytes as a data URI, and its size on the page."""
    with Image.open(io.BytesIO(picture.data)) as image:
        width, height = (round(side * _CSS_DPI / DPI) for side in image.size)
        data, kind = picture.data, "png"
        if shrink or picture.photograph:
            image = image.convert("RGB")
            if shrink:
                image.thumbnail((_SMALL_SIDE, _SMALL_SIDE))
            buffer = io.BytesIO()
            image.save(buffer, format="JPEG", quality=90)
            data, kind = buffer.getvalue(), "jpeg"
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return {"kind": "figure", "uri": uri, "caption": picture.caption, "width": width, "height": height}


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _is_repeated(values: Sequence[Any]) -> bool:
    """Returns whether a column repeats one word in every row; repeated numbers do not count."""
    return len(values) > 1 and bool(values[0]) and isinstance(values[0], str) and all(v == values[0] for v in values)


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and value != value):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:#.4g}".removesuffix(".")  # with the zeros at the end: numbers of a column are equally exact
    return f"{value:,}" if isinstance(value, int) else str(value)
