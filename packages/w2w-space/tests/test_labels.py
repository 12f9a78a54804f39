"""Labels of members from tables that people write, with what is wrong in them."""

import logging
from pathlib import Path

import pytest
import torch

from diffcore.errors import UserError
from w2w_space.files.labels import read_label_rows, read_labels
from w2w_space.layout import Layout
from w2w_space.population import Population, Stacked
from w2w_space.space import WeightSpace

NAMES = ("alice", "bob", "carla", "dan")


@pytest.fixture(scope="module")
def space() -> WeightSpace:
    layout = Layout.of({"to_q": (4, 3)}, rank=1)
    return WeightSpace.build(Population(layout, NAMES, Stacked(torch.randn(4, 7))))


def table(folder: Path, text: str) -> Path:
    (folder / "labels.csv").write_text(text)
    return folder / "labels.csv"


def test_both_forms_of_the_table_say_the_same(space: WeightSpace, tmp_path: Path):
    wide = "\ufeffadapter,age,hat\n\nbob,40,yes\nalice, 20 ,\ndan,,No\ncarla\n"
    long = "adapter,attribute,value\nbob,age,40\nbob,hat,true\nalice,age,20\ndan,hat,0\ncarla,hat\nbob,age,40.0\n"
    found = [read_labels(table(tmp_path, text), space) for text in (wide, long)]
    for labels in found:
        assert labels.attributes == ("age", "hat")
        assert str(labels.values.tolist()) == "[[20.0, nan], [40.0, 1.0], [nan, nan], [nan, 0.0]]"


def test_labels_of_others_are_told_and_cost_nothing(
    space: WeightSpace, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING):
        labels = read_labels(table(tmp_path, "adapter,age\nzoe,3\nbob,40\nyan,\nxi,5\n"), space)
    assert labels.values[1, 0] == 40
    assert int(labels.values.isfinite().sum()) == 1
    assert "no members are passed over, 2 in all: zoe, xi" in caplog.text
    with pytest.raises(UserError, match="no member of the space, but zoe; the members are alice, bob, carla, dan"):
        read_labels(table(tmp_path, "adapter,age\nzoe,3\n"), space)
    with pytest.raises(UserError, match="written without its members"):
        read_labels(table(tmp_path, "adapter,age\nbob,3\n"), space.without_members())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,age\nbob,3\n", "no column adapter"),
        ("adapter\nbob\n", "no column adapter"),
        ("", "no column adapter"),
        ("adapter,age\n\nbob,old\n", "line 3: old is no number"),
        ("adapter,age\nbob,inf\n", "line 2: inf is no number"),
        ("adapter,age\nbob,3\nalice,1\nbob,4\n", "line 4: age of bob is 4 here, and 3 above; keep one"),
        ("adapter,age\nbob,3,5\n", "line 2: there are 3 values for 2 columns"),
        ("adapter,age,age\nbob,3,5\n", "two columns age"),
        ("adapter,age\n", "no attributes"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(space: WeightSpace, tmp_path: Path, text: str, message: str):
    with pytest.raises(UserError) as told:
        read_labels(table(tmp_path, text), space)
    assert message in str(told.value).replace("'", "")


def test_a_table_of_bytes_is_none(tmp_path: Path):
    (tmp_path / "labels.csv").write_bytes(b"\x00\xff\r" * 99)
    with pytest.raises(UserError, match="no column adapter"):
        read_label_rows(tmp_path / "labels.csv")
