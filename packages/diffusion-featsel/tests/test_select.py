"""Planted sets are found: complementary halves first, copies never; budgets and ladders hold."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffcore.errors import UserError
from diffcore.hooks import Site
from diffusion_featsel.activation import Activation
from diffusion_featsel.alignment import Alignment
from diffusion_featsel.budget import Budget
from diffusion_featsel.information import ContentAndNoise, DrawAccumulator
from diffusion_featsel.labelled import (
    LabelledPairs,
    LabelledPixels,
    LabelledPixelsAccumulator,
    explained,
)
from diffusion_featsel.match import match_points
from diffusion_featsel.search import Search, Step
from diffusion_featsel.select import SelectSettings, select
from diffusion_featsel.selection import Selection


def activation(name: str, channels: int = 4, grid: int = 8, cost: float = 0.5) -> Activation:
    """Returns an activation of some size and place."""
    return Activation(name, Site(name), "res-out", "up", channels=channels, grid=(grid, grid), cost=cost)


def planted(seed: int, num_images: int = 40) -> tuple[dict[str, Tensor], Tensor]:
    """Returns four classes: half "left" tells 0 and 1 from the rest, "right" 0 and 2; and a copy, and noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (num_images, 8, 8), generator=generator)

    def noise(channels: int) -> Tensor:
        return torch.randn(num_images, channels, 8, 8, generator=generator)

    left = 0.4 * noise(4)
    left[:, 0] += (labels < 2).float()
    right = 0.5 * noise(4)
    right[:, 0] += (labels % 2).float()
    features = {"noise0": noise(4), "copy": left + 0.05 * noise(4), "left": left, "right": right, "noise1": noise(4)}
    return features, labels


def pixels_of(features: dict[str, Tensor], labels: Tensor) -> LabelledPixels:
    """Returns moments and kept pixels, added in two batches."""
    channels = {name: maps.shape[1] for name, maps in features.items()}
    sums = LabelledPixelsAccumulator(channels, 4, (8, 8), num_folds=5, pixels_per_image=64)
    for part in (slice(0, 15), slice(15, None)):
        sums.update({name: maps[part] for name, maps in features.items()}, labels[part])
    return sums.compute()


@pytest.mark.parametrize("seed", range(5))
def test_labels_find_both_halves_and_never_the_copy(seed: int) -> None:
    features, labels = planted(seed)
    candidates = {name: activation(name) for name in features}
    found = select(candidates, "12ch", pixels=pixels_of(features, labels))
    assert set(found.names) in ({"left", "right"}, {"copy", "right"})
    assert found.details["value"] > found.details["baselines"]["best single"]["value"]
    assert found.details["value"] > found.details["baselines"]["random"]["mean"] + 0.03
    assert found.details["ladder"] == "off: all candidates have the same resolution"
    assert Selection.from_json(found.to_json()) == found


@pytest.mark.parametrize("seed", range(3))
def test_one_informative_activation_is_enough(seed: int) -> None:
    features, labels = planted(seed)
    generator = torch.Generator().manual_seed(seed)
    features["all"] = F.one_hot(labels).permute(0, 3, 1, 2) + 0.3 * torch.randn(40, 4, 8, 8, generator=generator)
    candidates = {name: activation(name) for name in features if name in ("all", "noise0", "noise1")}
    assert select(candidates, "1MiB", pixels=pixels_of(features, labels)).names == ("all",)


def test_explained_variance_needs_no_pixels_and_ranks_alike() -> None:
    features, labels = planted(0)
    gram = pixels_of(features, labels).gram
    alone = {name: float(explained(gram.subset([name]), 1e-2).mean()) for name in features}
    assert max(alone, key=lambda name: alone[name]) in {"left", "copy"}
    assert float(explained(gram.subset(["left", "right"]), 1e-2).mean()) > alone["left"] + 0.1
    assert alone["noise0"] < 0.01


def test_fold_values_are_those_of_refitting() -> None:
    features, labels = planted(0, num_images=10)
    pixels = pixels_of(features, labels)
    values = pixels.fold_values(["left", "right"], 1e-2)
    maps = torch.cat([features["left"], features["right"]], 1).movedim(1, 3)
    for fold in range(5):
        test = torch.arange(fold, 10, 5)
        train = torch.tensor([i for i in range(10) if i % 5 != fold])
        x, y = maps[train].flatten(0, 2).double(), F.one_hot(labels[train].flatten(), 4).double()
        z = (x - x.mean(0)) / x.std(0, unbiased=False)
        weight = torch.linalg.solve(z.T @ z / len(z) + 1e-2 * torch.eye(8).double(), z.T @ (y - y.mean(0)) / len(z))
        scores = (maps[test].flatten(0, 2).double() - x.mean(0)) / x.std(0, unbiased=False) @ weight + y.mean(0)
        predicted, true = scores.argmax(1), labels[test].flatten()
        ious = [
            float(((predicted == c) & (true == c)).sum() / ((predicted == c) | (true == c)).sum()) for c in range(4)
        ]
        assert float(values[fold]) == pytest.approx(np.mean(ious))


def test_classes_that_a_fold_lacks_do_not_count() -> None:
    features, labels = planted(0, num_images=10)
    channels = {"left": 4}
    values = []
    for num_classes in (4, 6):
        sums = LabelledPixelsAccumulator(channels, num_classes, (8, 8))
        sums.update(features, labels)
        values.append(sums.compute().fold_values(["left"], 1e-2))
    torch.testing.assert_close(values[0], values[1])


def test_some_pixels_of_each_image_are_kept_at_random() -> None:
    features, labels = planted(0, num_images=10)
    kept = []
    for seed in (0, 0, 1):
        sums = LabelledPixelsAccumulator({"left": 4}, 4, (8, 8), num_folds=3, pixels_per_image=16, seed=seed)
        sums.update(features, labels)
        kept.append(sums.compute().rows)
    assert [len(rows) for rows in kept[0]] == [64, 48, 48]
    assert torch.equal(kept[0][0], kept[1][0])
    assert not torch.equal(kept[0][0], kept[2][0])
    few = LabelledPixelsAccumulator({"left": 4}, 4, (8, 8))
    few.update({"left": features["left"][:4]}, labels[:4])
    with pytest.raises(ValueError, match="4 images for 5 folds"):
        few.compute()


def draws(features: dict[str, Tensor], noise: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns two draws with independent noise around the same content."""
    first, second = (
        {name: maps + noise * torch.randn(maps.shape, generator=generator) for name, maps in features.items()}
        for generator in (torch.Generator().manual_seed(1), torch.Generator().manual_seed(2))
    )
    return first, second


def test_content_and_noise_have_their_closed_form() -> None:
    content = 1.5 * torch.randn(600, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    position = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    first, second = draws({"a": content + 3 * position}, 0.7)
    whole, parts = DrawAccumulator((4, 4)), DrawAccumulator((4, 4))
    whole.update(first, second)
    for part in (slice(0, 200), slice(200, None)):
        parts.update({"a": first["a"][part]}, {"a": second["a"][part]})
    found = whole.compute()
    torch.testing.assert_close(parts.compute().content, found.content)
    torch.testing.assert_close(found.content, 2.25 * torch.eye(4).double(), atol=0.1, rtol=0)
    torch.testing.assert_close(found.noise, 0.49 * torch.eye(4).double(), atol=0.03, rtol=0)
    assert found.information(["a"]) == pytest.approx(0.5 * 4 * math.log(1 + 2.25 / 0.49), rel=0.03)
    assert found.information([]) == 0.0
    with pytest.raises(ValueError, match="at least 2"):
        DrawAccumulator((4, 4)).compute()


def test_information_finds_both_halves_and_never_the_copy() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(60, 4, 8, 8, generator=generator) for _ in range(2))
    first, second = draws({"left": left, "right": 0.8 * right, "noise": torch.zeros(60, 4, 8, 8)}, 0.5)
    first["copy"], second["copy"] = first["left"] * 2, second["left"] * 2
    sums = DrawAccumulator((8, 8))
    sums.update(first, second)
    content = sums.compute()
    candidates = {name: activation(name) for name in first}
    found = select(candidates, "8ch", content=content)
    assert set(found.names) in ({"left", "right"}, {"copy", "right"})
    cka = content.cka()
    assert float(cka[0, 3]) == pytest.approx(1.0)
    assert float(cka[0, 1]) < 0.05


def test_wide_activations_are_projected_alike_every_time() -> None:
    maps = torch.randn(5, 50, 4, 4)
    sums = [DrawAccumulator((4, 4), width=8) for _ in range(2)]
    for each in sums:
        each.update({"a": maps}, {"a": maps + 1})
    one, other = (each.compute() for each in sums)
    assert torch.equal(one.content, other.content)
    assert one.channels == {"a": 8}


def test_scores_leave_out_copies_and_keep_a_ladder() -> None:
    grids = {"a": 8, "a2": 8, "b": 8, "c": 16, "d": 16}
    candidates = {name: activation(name, grid=grid) for name, grid in grids.items()}
    scores = {"a": 0.9, "a2": 0.89, "b": 0.8, "c": 0.5, "d": 0.4, "gone": 1.0, "b2": math.nan}
    matrix = torch.eye(5)
    matrix[0, 1] = matrix[1, 0] = 0.95
    alignment = Alignment(tuple(grids), matrix)
    found = select(candidates, "12ch", scores=scores, alignment=alignment)
    assert found.names == ("a", "c", "b")
    assert found.details["left_out"]["a2"] == {"like": "a", "cka": pytest.approx(0.95)}
    assert found.details["ladder"] == "met"
    free = SelectSettings(ladder=False)
    assert select(candidates, "12ch", scores=scores, alignment=alignment, settings=free).names == ("a", "b", "c")
    assert select(candidates, "12ch", scores=scores, settings=free).names == ("a", "a2", "b")
    assert select(candidates, "4ch", scores=scores).details["ladder"].startswith("not met")


def test_a_set_goes_on_where_the_other_resolutions_hold_copies_only() -> None:
    grids = {"a": 8, "b": 16, "c": 8, "d": 8}
    candidates = {name: activation(name, grid=grid) for name, grid in grids.items()}
    matrix = torch.eye(4)
    matrix[0, 1] = matrix[1, 0] = 0.95
    matrix[3] = matrix[:, 3] = torch.nan
    scores = {"a": 0.9, "b": 0.8, "c": 0.5, "d": 0.7}
    found = select(candidates, "12ch", scores=scores, alignment=Alignment(tuple(grids), matrix))
    assert found.names == ("a", "d", "c")
    assert (
        found.details["ladder"] == "not met: no candidate of the other resolutions fits the budget and is no near copy"
    )


def test_the_first_leaves_room_for_the_other_half() -> None:
    candidates = {
        "huge": activation("huge", channels=100, grid=8),
        "small": activation("small", channels=20, grid=8),
        "fine": activation("fine", channels=40, grid=16),
    }
    scores = {"huge": 0.9, "small": 0.5, "fine": 0.4}
    assert select(candidates, "100ch", scores=scores).names == ("small", "fine")
    assert select(candidates, "140ch", scores=scores).names == ("huge", "fine")


def test_budgets_in_all_units() -> None:
    candidates = {
        "a": activation("a", 1024, 32, 0.4),
        "b": activation("b", 512, 64, 0.8),
        "c": activation("c", 8, 32, 0.3),
    }
    scores = {"a": 0.5, "b": 0.9, "c": 0.1}
    off = SelectSettings(ladder=False)

    def names(budget: str) -> tuple[str, ...]:
        return select(candidates, budget, scores=scores, settings=off).names

    assert names("2MiB") == ("a",)
    assert names("6.1MiB") == ("b", "a", "c")
    assert names("600ch") == ("b", "c")
    assert names("flops:.5") == ("a", "c")
    assert names("flops:.35") == ("c",)
    assert Budget.of("flops:.5").cost(["a", "c"], candidates) == 0.4
    for wrong in ("8", "MiB", "flops:2", "flops:", "-3ch", "8 mib"):
        with pytest.raises(UserError, match="`budget`"):
            Budget.of(wrong)
    with pytest.raises(UserError, match=r"cheapest candidate, c, costs 8ch"):
        names("7ch")
    with pytest.raises(UserError, match="no candidates"):
        select(candidates, "1MiB", scores={})


@pytest.mark.parametrize(
    ("text", "limit", "shown"),
    [
        ("3B", 3, "0.00293KiB"),
        ("2kB", 2000, "1.95KiB"),
        ("2 KiB", 2048, "2KiB"),
        (".5MiB", 2**19, "0.5MiB"),
        ("1MB", 10**6, "0.954MiB"),
        ("1GB", 10**9, "954MiB"),
        ("1.5GiB", 1.5 * 2**30, "1.54e+03MiB"),
        ("3520ch", 3520, "3520ch"),
        ("flops:.625", 0.625, "flops:0.625"),
        ("flops:1", 1, "flops:1"),
    ],
)
def test_budgets_are_read_and_shown(text: str, limit: float, shown: str) -> None:
    budget = Budget.of(text)
    assert budget.limit == limit
    assert budget.shown(budget.limit) == shown
    with pytest.raises(UserError, match="`budget`"):
        Budget.of("flops:0")


def chosen_by(worth: dict[str, Any], candidates: dict[str, Activation], budget: str, **settings: Any) -> list[Step]:
    """Returns the steps of a greedy search; a set is worth what is listed, or else the sum over its members."""

    def value(names: tuple[str, ...]) -> Tensor:
        found = worth.get("".join(names), sum(worth.get(name, 0.0) for name in names))
        return torch.as_tensor(found, dtype=torch.float64).flatten()

    return Search(candidates, Budget.of(budget), value, SelectSettings(**settings)).greedy()


def names_of(steps: list[Step]) -> str:
    return "".join(step.name for step in steps)


def test_the_better_of_gain_and_gain_per_cost_is_taken() -> None:
    sizes = {"a": 10, "b": 3, "c": 3, "d": 3}
    candidates = {name: activation(name, channels=size) for name, size in sizes.items()}
    assert names_of(chosen_by({"a": 10.0, "b": 5.0, "c": 4.5, "d": 4.0}, candidates, "10ch")) == "bcd"
    assert names_of(chosen_by({"a": 10.0, "b": 4.0, "c": 0.0, "d": 0.0}, candidates, "10ch")) == "a"


def test_what_costs_next_to_nothing_is_not_taken_for_that() -> None:
    candidates = {"a": activation("a", channels=1), "b": activation("b", channels=5)}
    assert names_of(chosen_by({"a": 1.0, "b": 3.0}, candidates, "1000ch")) == "ba"


def test_a_step_must_exceed_its_standard_error_to_be_taken_and_to_be_kept() -> None:
    candidates = {name: activation(name) for name in "abc"}
    base, sure, unsure = torch.ones(4), torch.tensor([0.0, 0.0, 0.2, 0.2]), torch.tensor([-0.3, -0.3, 0.5, 0.3])
    steps = chosen_by({"a": base, "b": 0 * base, "c": 0 * base, "ab": base + sure}, candidates, "8ch")
    assert names_of(steps) == "ab"
    assert steps[1].gain == pytest.approx(0.1)
    assert steps[1].standard_error == pytest.approx(float(sure.std()) / 2)
    worth = {"a": base, "b": 0 * base, "c": 0 * base, "ab": base + unsure, "ac": base, "abc": 3 * base}
    assert names_of(chosen_by(worth, candidates, "12ch")) == "a"
    for loss, expected in ((sure, "abc"), (unsure, "bc"), (0 * base, "bc"), (sure - 0.11, "bc")):
        worth = {"a": base, "b": 0 * base, "c": 0 * base, "ab": 2 * base, "ac": base}
        worth |= {"bc": 3 * base - loss, "abc": 3 * base}
        assert names_of(chosen_by(worth, candidates, "12ch")) == expected


def test_the_missing_half_of_the_ladder_is_taken_and_kept_without_a_gain() -> None:
    candidates = {"a": activation("a", grid=16), "b": activation("b", grid=8)}
    for gain in (0.0, -0.2):
        assert sorted(names_of(chosen_by({"a": 1.0, "b": gain}, candidates, "8ch"))) == ["a", "b"]
    assert names_of(chosen_by({"a": 1.0, "b": 0.0}, candidates, "8ch", ladder=False)) == "a"


def test_the_lower_half_of_the_resolutions_is_coarse() -> None:
    candidates = {"a": activation("a", grid=8), "b": activation("b", grid=16), "c": activation("c", grid=32)}
    assert select(candidates, "8ch", scores={"a": 0.9, "b": 0.8, "c": 0.1}).names == ("a", "b")
    assert select(candidates, "8ch", scores={"b": 0.9, "c": 0.8, "a": 0.1}).names == ("b", "a")


def test_the_largest_size_holds_for_the_set_and_for_random_ones() -> None:
    candidates = {name: activation(name, grid=8 if name == "a" else 16) for name in "abcde"}
    scores = {"a": 0.1, "b": 0.9, "c": 0.8, "d": 0.7, "e": 0.6}
    found = select(candidates, "1MiB", scores=scores, settings=SelectSettings(max_size=2))
    assert found.names == ("b", "a")
    assert found.details["costs"]["b"] == {"channels": 4, "bytes": 4 * 16 * 16 * 2, "flops": 0.5}
    assert [step["cost"] for step in found.details["steps"]] == [4 * 16 * 16 * 2, 4 * 8 * 8 * 2]
    assert found.details["baselines"]["random"]["best"] == pytest.approx(0.85)
    wide = candidates | {"a": activation("a", channels=100, grid=8), "f": activation("f", grid=8)}
    one = select(wide, "100ch", scores=scores | {"a": 1.0, "f": 0.2}, settings=SelectSettings(max_size=1))
    assert one.names == ("a",)
    assert len(one.details["baselines"]["random"]["values"]) == 20
    assert max(one.details["baselines"]["random"]["values"]) <= 1
    dear = select(wide, "99ch", scores=scores | {"a": 1.0})
    assert dear.details["baselines"]["best single"]["names"] == ["b"]


def test_the_threshold_of_a_copy_is_a_copy() -> None:
    candidates = {name: activation(name) for name in "abc"}
    matrix = torch.eye(3)
    matrix[0, 1] = matrix[1, 0] = 0.5
    found = select(
        candidates,
        "8ch",
        scores={"a": 0.9, "b": 0.8, "c": 0.7},
        alignment=Alignment(tuple("abc"), matrix),
        settings=SelectSettings(redundancy=0.5),
    )
    assert found.names == ("a", "c")


def test_exactly_one_kind_of_evidence() -> None:
    candidates = {"a": activation("a")}
    content = ContentAndNoise({"a": 4}, torch.eye(4).double(), torch.eye(4).double())
    with pytest.raises(ValueError, match="exactly one"):
        select(candidates, "1MiB")
    with pytest.raises(ValueError, match="exactly one"):
        select(candidates, "1MiB", scores={"a": 1.0}, content=content)
    with pytest.raises(ValueError, match="`max_size`"):
        SelectSettings(max_size=0)
    with pytest.raises(ValueError, match="`redundancy`"):
        SelectSettings(redundancy=0.0)


def test_a_beam_finds_a_pair_that_greedy_search_walks_past() -> None:
    """The best single activation leads away from the best pair."""
    worth = {frozenset("a"): 1.0, frozenset("b"): 0.9, frozenset("c"): 0.8, frozenset("bc"): 3.0}
    candidates = {name: activation(name) for name in "abc"}

    def found(beam: int) -> list[str]:
        settings = SelectSettings(max_size=2, beam=beam, ladder=False)

        def value(names: tuple[str, ...]) -> torch.Tensor:
            return torch.tensor([worth.get(frozenset(names), 1.5 if len(names) == 2 else 0.0)])

        steps = Search(candidates, Budget.of("100ch"), value, settings).greedy()
        return sorted(step.name for step in steps)

    assert "a" in found(1)
    assert found(2) == ["b", "c"]
    with pytest.raises(ValueError, match="`beam`"):
        SelectSettings(beam=0)


def test_presets_and_random_sets_stand_beside() -> None:
    candidates = {str(i): activation(str(i)) for i in range(10)}
    scores = {str(i): i / 10 for i in range(10)}
    found = select(candidates, "8ch", scores=scores, presets={"legacy": ["0", "1"], "other": ["0", "x"]})
    beside = found.details["baselines"]
    assert found.names == ("9", "8")
    assert beside["legacy"] == {"names": ["0", "1"], "value": pytest.approx(0.05), "cost": "8ch"}
    assert "other" not in beside
    assert beside["random"]["num_sets"] == 20
    assert beside["random"]["mean"] < found.details["value"]
    assert beside["best single"]["names"] == ["9"]


def test_pairs_are_matched_from_sums_and_choose_the_set() -> None:
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(12, 6, 8, 8, generator=generator)

    def noisy(maps: Tensor, amount: float) -> Tensor:
        return maps + amount * torch.randn(maps.shape, generator=generator)

    source = {"left": noisy(signal[:, :3], 0.1), "right": noisy(signal[:, 3:], 0.1), "noise": noisy(signal[:, :3], 9)}
    target = {"left": noisy(signal[:, :3], 0.6), "right": noisy(signal[:, 3:], 0.6), "noise": noisy(signal[:, :3], 9)}
    points = torch.rand(12, 30, 2, generator=generator) * 32 - 0.5
    counted = torch.rand(12, 30, generator=generator) < 0.8
    table = LabelledPairs((32, 32))
    for part in (slice(0, 5), slice(5, None)):
        table.update(
            {name: maps[part] for name, maps in source.items()},
            {name: maps[part] for name, maps in target.items()},
            points[part],
            points[part],
            size=(32, 32),
            radius=torch.full((12,), 3.2)[part],
            counted=counted[part],
        )
    both = {name: (source[name], target[name]) for name in ("left", "right")}
    found = match_points(
        {name: maps[0] for name, maps in both.items()},
        {name: maps[1] for name, maps in both.items()},
        points,
        source_size=(32, 32),
        target_size=(32, 32),
    )
    near = (found.points - points).norm(dim=2) <= 3.2
    expected = (near & counted).sum(1).double() / counted.sum(1)
    torch.testing.assert_close(table.pair_values(["right", "left"]), expected, atol=0.02, rtol=0)
    candidates = {name: activation(name) for name in source}
    chosen = select(candidates, "12ch", pairs=table)
    assert set(chosen.names) == {"left", "right"}


def unique(height: int, width: int) -> Tensor:
    """Returns a map on which each cell has a channel of its own."""
    return torch.eye(height * width).view(1, height * width, height, width)


@pytest.mark.parametrize(("radius", "right"), [(5.0, 1.0), (4.99, 0.0)])
def test_a_point_at_the_radius_is_found(radius: float, right: float) -> None:
    table = LabelledPairs((6, 9))
    points = torch.tensor([[[2.0, 1.0], [7.0, 5.0]]])
    true = points + torch.tensor([[[3.0, 4.0], [4.0, -3.0]]])
    maps = {"a": unique(6, 9)}
    for counted in (None, torch.zeros(1, 2, dtype=torch.bool)):
        table.update(maps, maps, points, true, size=(6, 9), radius=torch.tensor([radius]), counted=counted)
    # The second pair has no point that counts.
    assert table.pair_values(["a"]).tolist() == [right]


def test_places_of_a_wide_grid_are_scaled_to_pixels() -> None:
    table = LabelledPairs((6, 9))
    points = torch.tensor([[[21.5, 7.0], [1.5, 13.0]]])  # centres of cells
    maps = {"a": unique(6, 9)}
    for offset in (0.0, 1.2):
        table.update(maps, maps, points, points + offset, size=(18, 36), radius=torch.tensor([1.5]))
    assert table.pair_values(["a"]).tolist() == [1.0, 0.0]


def test_weights_are_factors_of_the_activations() -> None:
    generator = torch.Generator().manual_seed(0)
    source, target = ({name: torch.randn(8, 3, 8, 8, generator=generator) for name in "ab"} for _ in range(2))
    points = torch.rand(8, 40, 2, generator=generator) * 16 - 0.5
    values = []
    for weights, factor in (({"a": 3.0}, 1.0), ({}, 3.0), ({}, 1.0)):
        table = LabelledPairs((16, 16), weights)
        first, second = ({"a": factor * maps["a"], "b": maps["b"]} for maps in (source, target))
        table.update(first, second, points, points, size=(16, 16), radius=torch.full((8,), 4.0))
        values.append(table.pair_values(["a", "b"]))
    torch.testing.assert_close(values[0], values[1])
    assert not torch.equal(values[0], values[2])


def test_the_matrix_is_ordered_by_likeness() -> None:
    matrix = torch.eye(4) * 0.5 + 0.5 * torch.tensor(
        [[1.0, 0.1, 0.9, 0.1], [0.1, 1.0, 0.1, 0.9], [0.9, 0.1, 1.0, 0.1], [0.1, 0.9, 0.1, 1.0]]
    )
    ordered = Alignment(("a", "b", "c", "d"), matrix).ordered()
    assert {frozenset(ordered.names[:2]), frozenset(ordered.names[2:])} == {frozenset("ac"), frozenset("bd")}
    assert ordered.of("a", "c") == pytest.approx(0.45)
    assert ordered.of("a", "z") == 0.0


def test_a_ranking_brings_its_own_scores_similarities_and_scales() -> None:
    from diffusion_featsel.ranking import Ranking, Scored

    rows = tuple(
        Scored(
            Activation(name, Site(name), "res-out", "up", channels=64, grid=(grid, grid)),
            rms=rms,
            mean=torch.zeros(64),
            std=torch.ones(64),
            massive=1.0,
            self_match=score,
        )
        for name, grid, rms, score in (("a", 8, 1.0, 0.9), ("b", 8, 2.0, 0.8), ("c", 16, 3.0, 0.5))
    )
    similarity = torch.eye(3)
    similarity[0, 1] = similarity[1, 0] = 0.95
    chosen = select(Ranking(rows, 50.0, 64, similarity), "4096ch")
    assert chosen.names == ("a", "c")
    assert dict(chosen.rms) == {"a": 1.0, "c": 3.0}
    own = {"a": 0.1, "b": 0.9, "c": 0.5}
    assert select(Ranking(rows, 50.0, 64, similarity), "4096ch", scores=own).names == ("b", "c")
    assert chosen.t == 50.0
