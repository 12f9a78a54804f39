"""The published code's table: typed by hand, and round trips."""

import csv
import json
from pathlib import Path

import pytest

from diffcore.errors import IncompatibleModelError, UserError
from diffcore.hooks import Site
from nemo_localize.files.neurons import read_neurons
from nemo_localize.files.published_table import PUBLISHED_SITES, AuthorsRow, read_authors_table, write_authors_table
from nemo_localize.neurons import NeuronSet
from nemo_localize.results import CaptionResult
from nemo_localize.sites import ValueSites, value_sites

SITES = ValueSites(tuple(Site(f"layer{place}.to_v") for place in range(7)), (320, 320, 640, 640, 1280, 1280, 1280))

TYPED = """\
Caption;URL;Initial Neurons;Initial SSIM;Refined Neurons;Refined SSIM
The No Limits Business Woman Podcast;https://example.org/a.jpg;"[[221], [], [], [124], [697], [], []]";0.17;\
"[[221], [], [], [], [], [], []]";0.189
"<i>The ""Long"" Dark</i>; 2nd &amp; last";;[[7, 7], [], [], [], [], [], [0, 1279]];0.4;;
"Café – naïve, 猫 'quoted'";;[[], [], [], [], [], [], []];;[[], [], [], [], [], [], []];
it failed;;;;;
"""

ROWS = [
    AuthorsRow(
        "The No Limits Business Woman Podcast",
        "https://example.org/a.jpg",
        NeuronSet.of({"layer0.to_v": [221], "layer3.to_v": [124], "layer4.to_v": [697]}),
        0.17,
        NeuronSet.of({"layer0.to_v": [221]}),
        0.189,
    ),
    AuthorsRow(
        '<i>The "Long" Dark</i>; 2nd &amp; last',
        initial=NeuronSet.of({"layer0.to_v": [7], "layer6.to_v": [0, 1279]}),
        initial_ssim=0.4,
    ),
    AuthorsRow("Café – naïve, 猫 'quoted'", initial=NeuronSet(), refined=NeuronSet()),
    AuthorsRow("it failed"),
]


def test_a_table_typed_by_hand(tmp_path):
    path = tmp_path / "typed.csv"
    path.write_text(TYPED, encoding="utf-8")
    assert read_authors_table(path, SITES) == ROWS
    header, *lines = TYPED.splitlines()
    numbered = [f";{header}", *(f"{place};{line}" for place, line in enumerate(lines))]
    path.write_text("\n".join(numbered), encoding="utf-8")  # with the row numbers that pandas writes
    assert read_authors_table(path, SITES) == ROWS


def test_what_is_written_is_read_back(tmp_path):
    rows = [*ROWS, AuthorsRow("=1+1; 'a'", initial_ssim=1 / 3), AuthorsRow(""), AuthorsRow('"'), AuthorsRow(" padded ")]
    path = write_authors_table(tmp_path / "table.csv", rows, SITES)
    assert read_authors_table(path, SITES) == rows
    lines = path.read_bytes().decode().split("\r\n")
    assert lines[0] == "Caption;URL;Initial Neurons;Initial SSIM;Refined Neurons;Refined SSIM"
    assert lines[1].split(";")[2] == "[[221], [], [], [124], [697], [], []]"


def test_results_become_rows():
    off, left = NeuronSet.of({"layer0.to_v": [1, 2]}), NeuronSet.of({"layer0.to_v": [2]})
    found = CaptionResult("a", "", "localized", initial=off, refined=left, score_initial=0.1, score_refined=0.2)
    assert AuthorsRow.of(found, "u") == AuthorsRow("a", "u", off, 0.1, left, 0.2)
    unrefined = CaptionResult("a", "", "not_localized", initial=off, score_initial=0.9)
    assert AuthorsRow.of(unrefined) == AuthorsRow("a", "", off, 0.9, NeuronSet(), 1.0)
    none = NeuronSet()
    assert AuthorsRow.of(CaptionResult("a", "", "not_memorised")) == AuthorsRow("a", "", none, 0.0, none, 0.0)
    assert AuthorsRow.of(CaptionResult("a", "", "error", error="NaN")) == AuthorsRow("a", "", none, None, none, None)


@pytest.mark.parametrize(
    "result",
    [
        CaptionResult("a", "", "not_memorised"),
        CaptionResult("a", "", "not_localized", initial=NeuronSet.of({"layer0.to_v": [1]}), score_initial=0.9),
        CaptionResult("a", "", "error", error="NaN"),
    ],
    ids=["not memorised", "not refined", "failed"],
)
def test_no_cell_of_neurons_is_empty(tmp_path, result):
    """Readers of these tables take such a cell apart as text; an empty one is none."""
    path = write_authors_table(tmp_path / "table.csv", [AuthorsRow.of(result)], SITES)
    (row,) = csv.DictReader(path.open(newline="", encoding="utf-8"), delimiter=";")
    assert [len(json.loads(row[f"{kind} Neurons"])) for kind in ("Initial", "Refined")] == [7, 7]


@pytest.mark.parametrize("up", [False, True])
def test_tables_of_any_number_of_layers_name_the_neurons(simple, tmp_path, up):
    backbone = simple.model.backbone
    deep, down = value_sites(backbone, up=True), value_sites(backbone)
    layers = (deep if up else down).sites
    own = NeuronSet.of({layers[0].module: [3], layers[-1].module: [1]})
    path = write_authors_table(tmp_path / "t.csv", [AuthorsRow("a", "", own, 0.4, own, 0.4)], deep if up else down)
    assert read_neurons(path, backbone=backbone) == (own, {"a": own})
    few = ValueSites(down.sites[:2], down.widths[:2])
    path = write_authors_table(tmp_path / "few.csv", [AuthorsRow("a", "", NeuronSet(), 0.0, NeuronSet(), 0.0)], few)
    with pytest.raises(IncompatibleModelError, match="neurons of 2 value layers, where this model has 7"):
        read_neurons(path, backbone=backbone)


@pytest.mark.parametrize(
    ("cell", "error", "message"),
    [
        ("[[1], []]", IncompatibleModelError, "line 2: neurons of 2 value layers, where this model has 7"),
        ("[[320], [], [], [], [], [], []]", IncompatibleModelError, r"line 2: layer0.to_v\[320\]"),
        ("[[-1], [], [], [], [], [], []]", UserError, "line 2: layer0.to_v"),
        ("[[1.5], [], [], [], [], [], []]", UserError, "line 2: neurons of layer0.to_v"),
        ("[1, 2, 3, 4, 5, 6, 7]", UserError, "line 2: .* no list of lists"),
        ("[[__import__('os')]]", UserError, "line 2"),
    ],
)
def test_other_tables_are_refused(tmp_path, cell, error, message):
    path = tmp_path / "table.csv"
    path.write_text(f'{TYPED.splitlines()[0]}\na;;"{cell}";;;\n')
    with pytest.raises(error, match=message):
        read_authors_table(path, SITES)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("Caption;URL\na;b\n")
    with pytest.raises(UserError, match="no column 'Initial Neurons'"):
        read_authors_table(path, SITES)
    for score in ("nan", "high"):
        path.write_text(f"{TYPED.splitlines()[0]}\na;;;{score};;\n")
        with pytest.raises(UserError, match=f"line 2: a score is {score}"):
            read_authors_table(path, SITES)
    path.write_text(f"{TYPED.splitlines()[0]}\nit failed;;;;;\na;b\n")
    with pytest.raises(UserError, match="line 3 has 2 cells"):
        read_authors_table(path, SITES)
    with pytest.raises(IncompatibleModelError, match="no searched neuron"):
        write_authors_table(path, [AuthorsRow("a", initial=NeuronSet.of({"other": [1]}))], SITES)


def test_a_published_table_names_the_neurons_to_switch_off(tmp_path: Path):
    """Read without a model: the tables are of the seven layers of Stable Diffusion 1.x."""
    mid = PUBLISHED_SITES.sites[-1].module
    wanted = NeuronSet.of({PUBLISHED_SITES.sites[0].module: [3], mid: [1279]})
    rows = [AuthorsRow("a; b", "", wanted, 0.4, wanted, 0.4), AuthorsRow("not memorised", "", None, None, None, None)]
    path = write_authors_table(tmp_path / "table.csv", rows, PUBLISHED_SITES)
    together, captions = read_neurons(path)
    assert together == wanted
    assert captions == {"a; b": wanted}
