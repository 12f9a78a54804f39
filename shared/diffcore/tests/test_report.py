import base64
import io
import logging
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffcore.report import Report, Series, bar_with_interval, histogram, image_grid, lines_with_band
from diffcore.report import report as report_module
from diffcore.report.style import PALETTE
from diffcore.run import Run

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg onload=alert(1)>",
    "</title><script src=//evil.example/x.js></script>",
    "</style><link rel=stylesheet href=http://evil.example>",
    "{{ 7 * 7 }}",
    "{% raw %}",
    "javascript:alert(1)",
    "&lt;script&gt;",
    "<!--",
    "]]>",
    "\x00\x1b[31m",
    "\u202egnp.exe",
    "\ud800",
    "x" * 5000,
    "<iframe srcdoc='<script>1</script>'>",
    '<a href="javascript:alert(1)">x</a>',
    "url(http://evil.example)",
    "@import 'http://evil.example'",
    '<meta http-equiv="refresh" content="0;url=http://evil.example">',
]
PROMPTS = [f"{prompt} {i}" for i in range(3) for prompt in HOSTILE][:50]


class Page(HTMLParser):
    """Collects what a browser would fetch or run."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.addresses, self.handlers, self.text, self.images = [], [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data", "poster", "formaction"):
                self.addresses.append((tag, name, value or ""))
            if name.startswith("on") or name in ("srcdoc", "style"):
                self.handlers.append((tag, name, value))
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_data(self, data):
        self.text.append(data)


def check_page(html: str) -> Page:
    """Asserts that a page needs nothing else and runs nothing."""
    page = Page(html)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form", "svg"} & set(page.tags)
    assert page.handlers == []
    for tag, name, value in page.addresses:
        assert value.startswith(("data:image/", "#")) or (tag, name) == ("a", "href"), (tag, name, value)
        assert not value.lower().lstrip().startswith("javascript:")
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)[1]
    assert "@import" not in style
    assert "url(" not in style
    assert "default-src 'none'" in html
    for image in page.images:
        kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,(.*)", image["src"]).groups()
        with Image.open(io.BytesIO(base64.b64decode(data))) as opened:
            opened.load()
            assert opened.format == kind.upper()
        assert image["alt"]
    return page


@pytest.fixture
def run(tmp_path):
    config = {"seed": 3, "rate": 1e-3, "prompt": HOSTILE[0]}
    with Run.open(tmp_path / "run", command="diffcore test", config=config, inputs={"data": "ab" * 32}) as run:
        yield run


def curves():
    x = [100, 200, 400]
    rows = [[3.0, 2.0, 1.0], [3.2, 2.1, 1.3]]
    return lines_with_band([Series.over_seeds("a", x, rows), Series("b", x, [2, 1, 1])], x_label="x", y_label="y")


def full_report(run):
    run.finish({})
    report = Report("What was asked?", run).answer("It is half.").numbers({"ratio": 0.5123456, "n": 1797})
    report.plot("curves", curves(), "Two seeds.").section("Samples").text("First.", "Second.")
    report.images(torch.rand(6, 1, 8, 8), "Digits.", columns=3, row_labels=["a", "b"], column_labels=["1", "2", "3"])
    report.section("Bars").figure(bar_with_interval(["a", "b"], [1.0, 2.0], x_label="x"), "Bars.")
    report.section("Table").table([{"arm": "a", "distance": 1.23456, "n": 1000, "ok": True}, {"arm": "b"}], "Rows.")
    return report.section("End").points("One.", "Two.")


def test_a_report_of_a_run_shows_what_the_run_kept_and_whether_it_is_finished(run):
    run.keep_table("scores", [{"arm": "a", "distance": 0.5}], "Kept rows.")
    assert run.has("table-scores")
    assert not run.has("table-others")
    assert (run.folder / "tables" / "scores.csv").read_text().startswith("arm,distance")

    def report() -> str:
        told = Report("Which arm?", run).answer("Arm a.").kept_table("others", "Not there")
        told.kept_table("scores", "Scores", lambda rows: [{"arm of the study": row["arm"]} for row in rows])
        return told.save().read_text()

    going_on = report()
    assert "arm of the study" in going_on
    assert "Kept rows." in going_on
    assert "Not there" not in going_on
    assert "Arm a." not in going_on
    assert "This run goes on" in going_on
    run.finish({})
    assert "Arm a." in report()
    assert "This run goes on" not in report()


def test_a_report_without_a_run_has_nothing_to_take_from_one():
    with pytest.raises(ValueError, match="give it one"):
        Report("t").kept_table("scores", "Scores")


def test_page_needs_nothing_else_and_shows_everything(run, tmp_path):
    path = full_report(run).save(tmp_path / "report.html")
    html = path.read_text()
    page = check_page(html)
    text = " ".join(page.text)
    for word in ("What was asked?", "It is half.", "0.5123", "1,797", "First.", "1.235", "1,000", "yes", "–", "Two."):
        assert word in text
    assert html.index("It is half.") < html.index("Two seeds.") < html.index("<table>") < html.index("How it was made")
    assert [image["alt"] for image in page.images] == ["Two seeds.", "Digits.", "Bars."]
    links = [value for tag, name, value in page.addresses if tag == "a"]
    assert links == [f"#section-{i}" for i in range(1, 5)]
    assert all(f'id="{link[1:]}"' in html for link in links)
    for figure in (run.folder / "figures").iterdir():
        assert base64.b64encode(figure.read_bytes()).decode() in html
    for word in ("abababababababab…", "seed = 3", "diffcore 0.1.0", "diffcore test"):
        assert word in text
    assert str(tmp_path) not in html


def test_hostile_text_is_shown_and_not_obeyed(run, tmp_path):
    report = Report(HOSTILE[3], run).answer(HOSTILE[1]).numbers({HOSTILE[0]: HOSTILE[1]})
    report.figure(curves(), HOSTILE[1]).section(HOSTILE[4]).points(*PROMPTS)
    for prompt in PROMPTS:
        report.text(prompt)
    report.table([{"prompt": prompt, HOSTILE[2]: 1} for prompt in PROMPTS], HOSTILE[0])
    html = report.save(tmp_path / "report.html").read_text()
    page = check_page(html)
    assert page.tags.count("li") == len(PROMPTS)
    text = "".join(page.text)
    assert text.count("<script>alert(1)</script> 0") == 3
    assert "{{ 7 * 7 }} 1" in text
    assert "49 1" not in text


def test_same_content_same_bytes(run, tmp_path):
    torch.manual_seed(0)
    first = full_report(run).save(tmp_path / "a.html").read_bytes()
    torch.manual_seed(0)
    second = full_report(run).save(tmp_path / "b.html").read_bytes()
    assert first == second


def test_without_a_run_and_empty(tmp_path):
    html = Report("Nothing yet").save(tmp_path / "r.html").read_text()
    check_page(html)
    assert "How it was made" not in html
    html = Report("Empty table").table([], "None.").save(tmp_path / "r.html").read_text()
    check_page(html)


def test_long_tables_are_cut_with_a_pointer(tmp_path):
    html = Report("t").table([{"i": i} for i in range(1000)], "All.").save(tmp_path / "r.html").read_text()
    assert html.count("<tr>") == 201
    assert "first 200 of 1000 rows" in html


@pytest.mark.parametrize(
    ("rows", "columns", "said"),
    [
        ([{"a": 1, "in": "SSIM"}, {"a": 2, "in": "SSIM"}], ["a"], "In, in all rows: SSIM."),
        ([{"a": 1, "in": "SSIM"}, {"a": 2, "in": "SSCD"}], ["a", "in"], ""),
        ([{"a": 1, "in": "SSIM"}, {"a": 2}], ["a", "in"], ""),
        ([{"a": 1, "in": "SSIM"}], ["a", "in"], ""),  # one row repeats nothing
        ([{"a": "x", "n": 5}, {"a": "x", "n": 5}], ["a", "n"], ""),  # the first column, and equal numbers, are findings
        ([{"a": 1, "in": "", "ok": True}, {"a": 2, "in": "", "ok": True}], ["a", "in", "ok"], ""),
    ],
)
def test_what_all_rows_repeat_is_said_once(rows, columns, said, tmp_path):
    html = Report("t").table(rows, "Rows.").save(tmp_path / "r.html").read_text()
    check_page(html)
    assert re.findall(r"<th scope[^>]*>([^<]*)</th>", html) == columns
    assert re.findall(r'<td[^>]*data-name="([^"]*)"', html) == columns * len(rows)
    assert f"<caption>Rows.{said and ' ' + said}</caption>" in html


@pytest.mark.parametrize(("count", "kinds"), [(2, ""), (3, " cards"), (6, " cards"), (7, " cards wide")])
def test_tables_fit_the_page_that_they_are_on(count, kinds, tmp_path):
    rows = [{f"column {i}": i for i in range(count)}]
    html = Report("t").table(rows, "Rows.").save(tmp_path / "r.html").read_text()
    assert f'<div class="table{kinds}"><table>' in html


def test_photographs_are_jpeg_and_large_reports_shrink(tmp_path, caplog, monkeypatch):
    images = torch.rand(4, 3, 300, 300, generator=torch.Generator().manual_seed(0))
    report = Report("t").images(images, "Photographs.").figure(curves(), "Curves.")
    page = check_page(report.save(tmp_path / "r.html").read_text())
    assert [image["src"][:15] for image in page.images] == ["data:image/jpeg", "data:image/png;"]
    monkeypatch.setattr(report_module, "_WARN_BYTES", 10_000)
    with caplog.at_level(logging.WARNING, "diffcore"):
        report.save(tmp_path / "r.html")
    assert "MB; mail and some browsers" in caplog.text
    monkeypatch.setattr(report_module, "_SHRINK_BYTES", 100_000)
    page = check_page(report.save(tmp_path / "r.html").read_text())
    for image in page.images:
        with Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))) as opened:
            assert max(opened.size) <= 256


def test_template_and_code_never_mark_text_as_safe():
    forbidden = re.compile(r"\|\s*safe|Markup\(|autoescape=False|import.*pyplot")
    for path in Path(report_module.__file__).parent.iterdir():
        if path.suffix in (".py", ".j2"):
            assert not forbidden.search(path.read_text()), path


# -- figures --------------------------------------------------------------------------------------------------


def pixels(figure) -> np.ndarray:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return np.asarray(Image.open(buffer).convert("RGB"))


def test_tiny_images_keep_their_pixels_exactly():
    images = torch.zeros(3, 1, 2, 2)
    images[0, 0] = torch.tensor([[0.0, 1.0], [0.5, 0.25]])
    images[1] = torch.tensor(float("nan"))
    images[2] = 7.0
    shown = pixels(image_grid(images, columns=3))
    side = shown.shape[0]
    assert side == 96
    half = side // 2
    blocks = [shown[:half, :half], shown[:half, half:side], shown[half:, :half], shown[half:, half:side]]
    assert [np.unique(block).tolist() for block in blocks] == [[0], [255], [128], [64]]
    gap = 6
    assert np.unique(shown[:, side : side + gap]).tolist() == [255]
    assert np.unique(shown[:, side + gap : 2 * side + gap]).tolist() == [0]
    assert np.unique(shown[:, 2 * (side + gap) :]).tolist() == [255]


def test_labels_do_not_cover_images():
    images = torch.zeros(4, 3, 32, 32)
    plain = pixels(image_grid(images, columns=2))
    labelled = pixels(image_grid(images, columns=2, row_labels=["vanilla", "b"], column_labels=["x", "y"]))
    assert labelled.shape[0] > plain.shape[0]
    assert labelled.shape[1] > plain.shape[1]
    corner = labelled[labelled.shape[0] - plain.shape[0] :, labelled.shape[1] - plain.shape[1] :]
    assert np.array_equal(corner, plain)
    assert (labelled < 128).any(axis=2)[:, : labelled.shape[1] - plain.shape[1]].any()  # there is a label


def test_images_of_other_channels_are_refused():
    with pytest.raises(ValueError, match="4 channels"):
        image_grid(torch.zeros(1, 4, 8, 8))


def test_lines_show_each_series_in_its_colour_and_band():
    figure = curves()
    axes = figure.axes[0]
    assert [line.get_color() for line in axes.lines] == list(PALETTE[:2])
    assert axes.lines[0].get_ydata().tolist() == pytest.approx([3.1, 2.05, 1.15])
    (band,) = axes.collections
    y = band.get_paths()[0].vertices[:, 1]
    assert (y.min(), y.max()) == (1.0, 3.2)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


@pytest.mark.parametrize(
    "names",
    [
        [f"n{i}" for i in range(8)],
        ["hat", "glasses", "beard", "man", "dark skin", "bald", "long hair", "WWWWWWWW"],
        [f"an attribute of many words {i}" for i in range(7)],
        ["_hidden", "mmmmm mmmmm " * 12, "b", "word " * 60],
    ],
)
def test_legends_of_many_or_long_names_are_whole(names: list[str]):
    figure = lines_with_band([Series(name, [0, 1], [0, 1]) for name in names], x_label="x", y_label="y")
    figure.canvas.draw()
    legend = figure.legends[0]
    box, plot = legend.get_window_extent(), figure.axes[0].get_window_extent()
    assert 0 <= box.x0 <= box.x1 <= figure.bbox.width + 1
    assert plot.y1 < box.y0 + 1
    assert box.y1 <= figure.bbox.height + 1
    assert plot.height > 0.55 * 3.4 * figure.dpi  # it is not squeezed by its legend
    shown = [text.get_text().replace("\n", " ").strip() for text in legend.get_texts()]
    assert shown == [name.strip() for name in names if not name.startswith("_")]
    styles = {(line.get_color(), str(line.get_linestyle())) for line in figure.axes[0].lines}
    assert len(styles) == len(names)


def test_logarithmic_axes_have_plain_numbers():
    figure = lines_with_band(
        [Series("a", [100, 1000], [0.5, 20])], x_label="x", y_label="y", log_x=True, log_y=True, title="t"
    )
    figure.draw_without_rendering()
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["100", "1000"]
    assert {"0.5", "1", "10", "20"} <= {t.get_text() for t in figure.axes[0].get_yticklabels()}


def test_bars_carry_value_interval_and_reference():
    figure = bar_with_interval(
        ["a", "b"], [1.0, 2.0], [0.5, 1.5], [1.5, 2.75], x_label="x", reference=0.25, reference_label="floor"
    )
    axes = figure.axes[0]
    assert [bar.get_width() for bar in axes.patches] == [1.0, 2.0]
    assert [text.get_text() for text in axes.texts] == ["1", "2", "floor"]
    spans = [list(line.get_xdata()) for line in axes.lines]
    assert [0.5, 1.5] in spans
    assert [1.5, 2.75] in spans


def test_histogram_integrates_to_one_over_common_bins():
    rng = np.random.default_rng(0)
    figure = histogram(
        {"a": rng.normal(size=500), "b": torch.randn(300) + 2}, x_label="x", threshold=1.0, threshold_label="cut"
    )
    outlines = [patch.get_data() for patch in figure.axes[0].patches]
    for values, edges, _ in outlines:
        assert float((values * np.diff(edges)).sum()) == pytest.approx(1)
        assert np.array_equal(edges, outlines[0].edges)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "cut"]


def test_few_samples_are_points_each_at_its_value():
    few, many = [0.2, 0.8, 0.8, 0.5], np.random.default_rng(0).normal(size=500)
    axes = histogram({"few": few}, x_label="x", threshold=2.0, threshold_label="cut").axes[0]
    points = axes.lines[0]
    assert not axes.patches
    assert list(points.get_xdata()) == few
    heights = list(points.get_ydata())
    assert heights[1] != heights[2]  # equal values do not cover one another
    assert heights[0] == heights[1] == heights[3]
    low, high = axes.get_xlim()
    assert low < 0.2
    assert high > 2.0
    axes = histogram({"many": many, "few": few, "none": []}, x_label="x").axes[0]
    assert len(axes.patches) == 2  # one filled, one outlined
    assert [list(line.get_xdata()) for line in axes.lines] == [few, []]
    assert [len(histogram({"n": many[:n]}, x_label="x").axes[0].lines) for n in (1, 29, 30)] == [1, 1, 0]


def test_figures_leave_matplotlib_as_it_was():
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    curves()
    image_grid(torch.zeros(1, 1, 4, 4))
    assert dict(mpl.rcParams) == before
