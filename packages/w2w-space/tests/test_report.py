"""The page of a run: what the figures show is what the run kept, and `report` makes all of it again."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffcore.cli import main
from diffcore.run import Run
from w2w_space.app.cli import app
from w2w_space.app.figures import members_map, scree, signed_matrix, turned_signs
from w2w_space.app.report import answer_of, percentiles_of, save_directions_parts, save_map_parts, save_space_parts
from w2w_space.diagnose import cross_fitted, diagnosed, members_by_distance
from w2w_space.directions import find_directions, held_out_leaks
from w2w_space.files.population import Member
from w2w_space.files.previews import previews
from w2w_space.labels import Labels
from w2w_space.layout import Layout
from w2w_space.population import Population, Stacked
from w2w_space.space import WeightSpace

LAYOUT = Layout.of({"blocks.0.to_q": (20, 20), "blocks.1.to_q": (10, 10)}, rank=1)


def planted(members: int = 60) -> tuple[Population, torch.Tensor]:
    """Returns members along three strong components in noise, and their places along these."""
    g = torch.Generator().manual_seed(0)
    places = torch.randn(members, 3, generator=g)
    matrix = 3 * places @ torch.randn(3, LAYOUT.size, generator=g) + torch.randn(members, LAYOUT.size, generator=g)
    return Population(LAYOUT, tuple(f"m{i}" for i in range(members)), Stacked(matrix)), places


def space_run(folder: Path) -> tuple[WeightSpace, torch.Tensor]:
    population, places = planted()
    told = diagnosed(population, WeightSpace.build(population, gauge="raw"))
    labels = Labels.of(population.names, {"tall": places[:, 0].tolist(), "wide": places[:, :2].sum(1).tolist()})
    found = find_directions(told.space, labels, estimator="mean")
    with Run.open(folder, command="w2w-space build", config={}, inputs={}) as run:
        save_space_parts(run, told.space, variances=told.variances, limits=told.limits)
        save_map_parts(run, told.space, {"m3": torch.full((3, 8, 8), 0.5)})
        save_directions_parts(run, found, told.space, held_out_leaks(told.space, labels, estimator="mean"))
        run.finish({"answer": answer_of(told.space, len(told.variances))})
    return told.space, told.limits


def test_a_report_is_made_again_from_the_folder_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    space, limits = space_run(tmp_path / "run")
    assert main(app, ["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    for words in ("3 of 59 components are kept", "Where the members lie", "1 of them with pictures", "What else moves"):
        assert words in page
    assert "<script" not in page
    figures = {path.stem for path in (tmp_path / "run" / "figures").glob("*.png")}
    assert figures == {"spectrum", "cumulative", "map", "leaks", "cosines"}
    rows = (tmp_path / "run" / "tables" / "spectrum.csv").read_text().splitlines()
    assert len(rows) == 60
    _, variance, share, _, chance = map(float, rows[1].split(","))
    assert variance == pytest.approx(float(space.variances[0]))
    assert chance / share == pytest.approx(float(limits[0] / space.variances[0]))


def test_the_scree_shows_chance_and_what_is_kept():
    axes = scree([0.5, 0.3, 0.2], kept=2, chance=[0.4, 0.35, 0.3]).axes[0]
    assert [list(np.asarray(line.get_ydata(), float)) for line in axes.lines[:2]] == [[0.5, 0.3, 0.2], [0.4, 0.35, 0.3]]
    assert list(np.asarray(axes.lines[2].get_xdata(), float)) == [2.5, 2.5]
    assert len(scree([0.5, 0.5], kept=2).axes[0].lines) == 1


def test_a_map_names_few_members_and_shows_pictures_where_there_are_some():
    places = torch.randn(80, 2, generator=torch.Generator().manual_seed(0)).numpy()
    names = [f"m{i}" for i in range(80)]
    few = members_map(places[:5], names[:5], [0.5, 0.2]).axes[0]
    assert {text.get_text() for text in few.texts} == set(names[:5])
    many = members_map(places, names, [0.5, 0.2]).axes[0]
    assert 5 < len(many.texts) < 20
    farthest = names[int((places**2).sum(1).argmax())]
    assert farthest in {text.get_text() for text in many.texts}
    pictures = [torch.rand(1, 8, 8) if i % 2 else None for i in range(80)]
    shown = members_map(places, names, [0.5, 0.2], pictures).axes[0]
    assert len(shown.artists) == 28
    assert not shown.texts


def test_matrices_and_signs_are_drawn_as_they_are():
    axes = signed_matrix(["a", "b"], [[1.0, -0.25], [0.5, 1.0]], x_label="score", y_label="moved along").axes[0]
    assert [text.get_text() for text in axes.texts] == ["1.00", "-0.25", "0.50", "1.00"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a", "b"]
    assert turned_signs([0.42, 0.43]).axes[0].get_ylim() == (-0.02, 0.52)


def test_leaks_of_other_members_tell_what_two_attributes_share():
    """A label that is the sum of two independent ones moves half of it, and directions from noise leak nothing."""
    population, places = planted(200)
    space = diagnosed(population, WeightSpace.build(population, gauge="raw")).space
    values = {"one": places[:, 0], "both": places[:, 0] + places[:, 1], "other": places[:, 2]}
    labels = Labels.of(population.names, {name: column.tolist() for name, column in values.items()})
    leaks = held_out_leaks(space, labels, estimator="mean")
    assert leaks.diagonal().tolist() == pytest.approx([1.0] * 3)
    assert float(leaks[0, 1]) == pytest.approx(1 / 2**0.5, abs=0.12)
    assert leaks[:2, 2].abs().max() < 0.2


def test_noise_that_two_labels_share_is_no_leak():
    """It is in the directions of the members that it was found with, and not in the scores of others."""
    population, places = planted(200)
    space = WeightSpace.build(population, gauge="raw", num_components=60)
    shared = 1.5 * torch.randn(200, generator=torch.Generator().manual_seed(1))
    values = {"one": places[:, 0] + shared, "other": places[:, 1] + shared}
    labels = Labels.of(population.names, {name: column.tolist() for name, column in values.items()})
    among_themselves = find_directions(space, labels, estimator="mean").leaks()
    leaks = held_out_leaks(space, labels, estimator="mean", splits=20)
    apart = ~torch.eye(2, dtype=torch.bool)
    assert float(among_themselves[apart].min()) > 0.3
    assert float(leaks[apart].abs().max()) < 0.15


def test_percentiles_are_those_of_members_where_strengths_put_points():
    """Held-out coordinates are short: by them a strength that many members reach would be beyond all."""
    g = torch.Generator().manual_seed(0)
    population = Population(LAYOUT, tuple(map(str, range(100))), Stacked(torch.randn(100, LAYOUT.size, generator=g)))
    space, _ = cross_fitted(WeightSpace.build(population, gauge="raw"), num_components=20)
    found = find_directions(space, Labels.of(population.names, {"one": space.members[:, 3].tolist()}))
    row = percentiles_of(found, space)[0]
    places = found["one"].place(space.members)
    assert float((places < row["5th"]).double().mean()) == pytest.approx(0.05, abs=0.01)
    assert row["99th"] > row["95th"] > row["50th"] > row["1st"]
    assert float((found["one"].place(space.held_out) < row["5th"]).double().mean()) < 0.01


def test_members_are_told_by_distance():
    population, _ = planted()
    space = diagnosed(population, WeightSpace.build(population, gauge="raw")).space
    rows = members_by_distance(space.member("m7"))
    assert rows[0] == ("m7", 0.0)
    assert len(rows) == 60
    assert [d for _, d in rows] == sorted(d for _, d in rows)
    other = dict(rows)["m3"]
    assert other == pytest.approx(float((space.member("m3").z - space.member("m7").z).norm()), rel=1e-4)


def test_pictures_beside_adapters_are_found_and_bad_ones_passed_over(tmp_path: Path):
    Image.new("RGB", (200, 100), (255, 0, 0)).save(tmp_path / "a.png")
    Image.new("L", (8, 8), 128).save(tmp_path / "folder.preview.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    sources = {"a": "a.safetensors", "b": "folder", "c": "bad.safetensors", "d": "none.safetensors"}
    members = [Member(name, source=(tmp_path / source).as_posix()) for name, source in sources.items()]
    found = previews([*members, Member("trained")])
    assert set(found) == {"a", "b"}
    assert found["a"].shape == (3, 32, 64)
    assert found["a"][:, 0, 0].tolist() == pytest.approx([1.0, 0.0, 0.0], abs=1e-5)
    assert float(found["b"].mean()) == pytest.approx(128 / 255)
