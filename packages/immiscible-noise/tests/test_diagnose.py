"""Diagnostics against planted truth."""

import math

import pytest
import torch

from immiscible_noise import PRESETS, diagnose
from immiscible_noise.diagnose import CouplingStatistics, main_direction, recommend
from immiscible_noise.leak import ClassLeak, class_leak, pool_noise


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_classes(num: int = 600, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(num) % classes
    centres = torch.randn(classes, 1, 4, 4, generator=seeded(1))
    return centres[labels] + 0.5 * torch.randn(num, 1, 4, 4, generator=seeded(2)), labels


@pytest.fixture(scope="module")
def statistics() -> dict[tuple[str, int], CouplingStatistics]:
    images, labels = make_classes()
    result = diagnose(images, labels=labels, batch_sizes=(16, 128, 4096), num_pairs=2400, generator=seeded())
    assert result.recommendation.coupling.method == "assignment"
    return {(s.coupling, s.batch_size): s for s in result.statistics}


def test_every_coupling_is_measured_at_the_sizes_that_fit(statistics):
    assert set(statistics) == {
        ("independent", 128),
        *((coupling, size) for coupling in ("assignment", "blocks") for size in (16, 128)),
        ("nearest", 128),
    }
    assert all(s.num_pairs >= 2400 for s in statistics.values())


def test_independent_noise_is_the_zero_of_every_scale(statistics):
    plain = statistics["independent", 128]
    assert plain.reduction == 0
    assert plain.tilt == pytest.approx(0, abs=0.08)
    assert plain.norm_ratio == pytest.approx(1, abs=0.03)
    assert plain.main_direction_variance == pytest.approx(1, abs=0.12)
    assert not plain.leak.exceeds_chance


def test_larger_batches_pull_more_and_blocks_pull_less(statistics):
    reduction = {key: s.reduction for key, s in statistics.items()}
    assert 0 < reduction["assignment", 16] < reduction["assignment", 128]
    assert 0 < reduction["blocks", 128] < reduction["assignment", 128]
    tilt = statistics["assignment", 128].tilt
    assert 0.5 < tilt < math.sqrt(2 * math.log(128))


def test_only_selection_shortens_the_noise(statistics):
    assert statistics["nearest", 128].norm_ratio < 0.9
    assert statistics["assignment", 128].norm_ratio == pytest.approx(1, abs=0.03)


def test_leak_shows_for_ignored_labels_and_not_within_blocks(statistics):
    free, within = statistics["assignment", 128].leak, statistics["blocks", 128].leak
    assert free.chance == within.chance == pytest.approx(1 / 3)
    assert free.exceeds_chance
    assert free.accuracy > 0.5
    assert not within.exceeds_chance


def test_leak_probe_finds_a_planted_shift_at_its_bayes_rate():
    labels = torch.randint(2, (4000,), generator=seeded())
    noise = torch.randn(4000, 6, generator=seeded(1))
    noise[:, 2] += labels
    found = class_leak(noise, labels)
    bayes = 0.5 * (1 + math.erf(0.5 / math.sqrt(2)))
    assert found.accuracy == pytest.approx(bayes, abs=3 * found.standard_error)
    assert found.exceeds_chance


def test_leak_probe_stays_at_chance_for_pure_noise_and_unequal_classes():
    excesses = []
    for seed in range(20):
        noise = torch.randn(500, 40, generator=seeded(seed))
        labels = (torch.rand(500, generator=seeded(100 + seed)) < 0.15).long()
        found = class_leak(noise, labels)
        excesses.append((found.accuracy - found.chance) / found.standard_error)
    assert abs(sum(excesses) / len(excesses)) < 1
    assert sum(excess > 2 for excess in excesses) <= 3


def test_leak_probe_ignores_classes_too_small_to_split():
    noise = torch.randn(50, 3, generator=seeded())
    assert class_leak(noise, torch.tensor([0] * 20 + [1] * 28 + [2] * 2)).chance == 0.5
    with pytest.raises(ValueError, match="1 classes of at least 5"):
        class_leak(noise, torch.tensor([0] * 47 + [1] * 3))


def test_two_points_and_two_standard_errors_decide():
    assert ClassLeak(0.13, 0.1, 0.01, 1000).exceeds_chance
    assert not ClassLeak(0.115, 0.1, 0.001, 1000).exceeds_chance
    assert not ClassLeak(0.13, 0.1, 0.02, 100).exceeds_chance


@pytest.mark.parametrize(
    ("shape", "features"), [((7,), 7), ((2, 20), 16), ((3, 16, 16), 192), ((3, 4, 4), 48), ((1, 4, 8, 8), 256)]
)
def test_pooling(shape, features):
    assert pool_noise(torch.randn(5, *shape)).shape == (5, features)


def test_main_direction_is_the_first_principal_component():
    direction = torch.nn.functional.normalize(torch.randn(40, generator=seeded()), dim=0)
    scores = 3 * torch.randn(300, 1, generator=seeded(1))
    images = 5 + scores * direction + torch.randn(300, 40, generator=seeded(2))
    found = main_direction(images.reshape(300, 4, 10))
    expected = torch.linalg.svd(images - images.mean(0)).Vh[0]
    assert float((found @ expected).abs()) == pytest.approx(1, abs=1e-4)


def make_statistics(coupling: str, reduction: float, leak: float | None = None) -> CouplingStatistics:
    found = None if leak is None else ClassLeak(leak, 0.1, 0.005, 4000)
    return CouplingStatistics(coupling, 256, reduction, 1.0, 1.0, 1.0, 4000, found)


@pytest.mark.parametrize(
    ("rows", "coupling", "word"),
    [
        ([("assignment", 0.022)], "assignment", "no labels"),
        ([("assignment", 0.022, 0.16), ("blocks", 0.014, 0.1)], "assignment", "16.0%"),
        ([("assignment", 0.022, 0.11), ("blocks", 0.014, 0.1)], "assignment", "no leak"),
        ([("assignment", 0.022, 0.16), ("blocks", 0.001, 0.1)], "vanilla", "too little"),
        ([("assignment", 0.11)], "half", "half strength"),
    ],
)
def test_recommendation(rows, coupling, word):
    advice = recommend([make_statistics(*row) for row in rows])
    assert advice.coupling == PRESETS[coupling]
    assert word in advice.why


def test_same_generator_same_diagnosis():
    images, labels = make_classes(60)
    runs = [diagnose(images, labels=labels, batch_sizes=(20,), num_pairs=60, generator=seeded()) for _ in range(2)]
    assert runs[0] == runs[1]
