"""A second look decides by images, costs what it may, and never calls clean what it could not see."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from nemo_localize.calibrate import _interval
from nemo_localize.likeness import Likeness, likeness
from nemo_localize.planted import Planted, ordinary_captions
from nemo_localize.second_look import FIRST_SEEDS, PATIENCE, SEEDS, STEPS, Look, SecondLook, Usual, looks, second_look
from nemo_localize.settings import ImageSettings

TRIGGER = "portrait of 1917 no 1"
SETTINGS = ImageSettings(guidance_scale=1.0)
ROWS = 5  # of one image


def pairs(seeds: int, alike: int, high: float = 0.9, low: float = 0.4) -> tuple[float, ...]:
    """All pairs of seeds, of which the first `alike` draw one image."""
    return tuple(high if b < alike else low for a in range(seeds) for b in range(a + 1, seeds))


def usual(count: int = 24, level: float = 0.4, spread: float = 0.05) -> list[Look]:
    values = torch.linspace(level - spread, level + spread, count).tolist()
    return [Look(f"ordinary {i}", (value,) * 6) for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("look", "verdict"),
    [
        (Look("all seeds", pairs(10, 10)), "memorised"),
        (Look("most seeds", pairs(10, 8)), "memorised"),
        (Look("some seeds", pairs(10, 4)), "undecided"),
        (Look("one pair, by chance", pairs(10, 2)), "clean"),
        (Look("none", pairs(10, 0)), "clean"),
        (Look("words pin it down, below a copy", (0.69,) * 45), "clean"),
        (Look("all seeds show a training image", pairs(10, 0), (0.8,) * 10), "memorised"),
        (Look("two seeds show a training image", pairs(10, 0), (0.8,) * 2 + (0.3,) * 8), "undecided"),
        (Look("unlike its training image, but seeds agree", pairs(10, 10), (0.3,) * 10), "memorised"),
        (Look("no images", error="they hold NaN"), "undecided"),
    ],
)
def test_images_decide(look: Look, verdict: str):
    assert Usual.of(usual()).verdict(look) == verdict


def test_what_ordinary_captions_draw_raises_what_counts():
    varied = Usual.of(usual())
    assert (varied.memorised_above, varied.undecided_above) == (0.7, 0.7)
    alike = Usual.of(usual(level=0.65, spread=0.1))  # their words say nearly all of a image
    expected = 0.65 + 3 * 1.4826 * 0.05217
    assert alike.memorised_above == pytest.approx(expected, abs=1e-3)
    assert 0.7 < alike.undecided_above < alike.memorised_above
    assert alike.verdict(Look("as usual", (0.75,) * 6)) == "clean"
    assert varied.verdict(Look("the same images, unusual", (0.75,) * 6)) == "memorised"


@pytest.mark.parametrize("mistaken", [1, 3, 6])
def test_a_few_memorised_references_do_not_hide_a_memory(mistaken: int):
    looked = usual()
    spoilt = Usual.of([*looked[mistaken:], *(Look(f"mistaken {i}", (0.95,) * 6) for i in range(mistaken))])
    assert spoilt.memorised_above < 0.75
    assert spoilt.verdict(Look("memorised", pairs(10, 10))) == "memorised"


@pytest.mark.parametrize(
    "references",
    [usual(level=0.9), [], [Look("no images", error="they hold NaN")]],
    ids=["a model of little variety", "no references", "references without images"],
)
def test_where_images_tell_nothing_nothing_is_clean_that_looks_alike(references: list[Look]):
    found = Usual.of(references)
    assert not found.telling
    assert found.verdict(Look("alike", (0.95,) * 6)) == "undecided"
    assert found.verdict(Look("different", (0.3,) * 6)) == "clean"


class Camera:
    """Draws what it was told; counts the images."""

    def __init__(self, alike: dict[str, int]) -> None:
        self.alike, self.images, self.asked = alike, 0, list[tuple[str, int]]()

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[Look]:
        self.images += len(prompts) * len(seeds)
        self.asked += [(prompt, len(seeds)) for prompt in prompts]
        return [Look(prompt, pairs(len(seeds), self.alike.get(prompt, 0))) for prompt in prompts]


def looked(camera: Camera, count: int, *, certain: int = 0, allowed: int = 0) -> SecondLook:
    ranked, references = [f"caption {i}" for i in range(count)], [f"ordinary {i}" for i in range(30)]
    return second_look(camera, ranked, references, certain=certain, rows_per_image=ROWS, allowed_rows=allowed)


@pytest.mark.parametrize(
    ("count", "certain", "allowed", "seen"),
    [
        (5, 0, 0, 5),  # a short list is looked at whole, whatever it costs
        (200, 0, 0, PATIENCE),
        (200, 70, 0, 80),  # all above the threshold, in whole batches
        (200, 0, (24 + 64) * len(FIRST_SEEDS) * ROWS, 64),
        (200, 0, (24 + 64) * len(FIRST_SEEDS) * ROWS - 1, 48),
        (200, 0, 10**6, 200),
    ],
)
def test_it_costs_what_it_may(count: int, certain: int, allowed: int, seen: int):
    camera = Camera({})
    found = looked(camera, count, certain=certain, allowed=allowed)
    assert [look.prompt for look in found.looks] == [f"caption {i}" for i in range(seen)]
    assert found.rows == camera.images * ROWS


def test_it_goes_on_while_the_last_ones_were_not_clean():
    camera = Camera({"caption 20": 10, "caption 50": 4, "caption 70": 10, "caption 120": 10})
    found = looked(camera, 200)
    assert len(found.looks) == 112  # 70 is in the fifth batch, two quiet ones follow; 120 is not reached
    verdicts = found.verdicts()
    assert {prompt: verdict for prompt, verdict in verdicts.items() if verdict != "clean"} == {
        "caption 20": "memorised",
        "caption 50": "undecided",
        "caption 70": "memorised",
    }
    assert [prompt for prompt, seeds in camera.asked if seeds == len(SEEDS)] == [
        "caption 20",
        "caption 50",
        "caption 70",
    ]


def test_looks_see_a_planted_memory(simple: Planted):
    other = ordinary_captions(1, seed=9)[0]
    seen = looks(simple.model, [TRIGGER, other], FIRST_SEEDS, SETTINGS, likeness(of_latents=True))
    assert [len(look.pairs) for look in seen] == [6, 6]
    assert seen[0].typical > 0.7 > seen[1].upper
    alone = looks(simple.model, [other], FIRST_SEEDS, SETTINGS, likeness(of_latents=True))
    assert alone[0].pairs == pytest.approx(seen[1].pairs, abs=1e-4)
    assert looks(simple.model, [], SEEDS, SETTINGS, likeness(of_latents=True)) == []


def test_images_that_are_no_numbers_are_no_evidence(simple: Planted, monkeypatch: pytest.MonkeyPatch):
    import nemo_localize.second_look as module

    monkeypatch.setattr(module, "generate_latents", lambda *_: torch.full((1, 4, 4, 16, 16), math.nan))
    (seen,) = looks(simple.model, [TRIGGER], FIRST_SEEDS, SETTINGS, likeness(of_latents=True))
    assert seen.error is not None
    assert "`dtype`" in seen.error
    assert Usual.of(usual()).verdict(seen) == "undecided"


def test_images_of_noise_are_no_evidence_either(simple: Planted, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("nemo_localize.likeness.looks_like_noise", lambda rows, noise: torch.arange(len(rows)) == 1)
    judge = Likeness("SSCD", "test", lambda images: functional.normalize(images.flatten(1), dim=1), torch.ones(1, 1))
    (look,) = looks(simple.model, [TRIGGER], FIRST_SEEDS, SETTINGS, judge)
    assert "images are noise" in look.error
    assert Usual.of(usual()).verdict(look) == "undecided"


def test_all_that_is_compared_is_drawn_in_as_many_steps(simple: Planted, monkeypatch: pytest.MonkeyPatch):
    import nemo_localize.second_look as module

    asked: list[ImageSettings] = []

    def spied(*given: Any) -> torch.Tensor:
        asked.append(given[3])
        return torch.zeros(1, 4, 4, 16, 16)

    monkeypatch.setattr(
        module, "generate_latents", lambda *given: asked.append(given[3]) or torch.zeros(1, 4, 4, 16, 16)
    )
    for steps in (20, 50):
        looks(simple.model, [TRIGGER], FIRST_SEEDS, replace(SETTINGS, steps=steps), likeness(of_latents=True))
    assert [settings.steps for settings in asked] == [STEPS, STEPS]


@pytest.mark.parametrize("quantile", [None, 0.9])
def test_the_interval_of_a_threshold_holds_the_truth_nearly_as_often_as_it_says(quantile: float | None):
    rng = np.random.default_rng(7)
    truth = 1.0 if quantile is None else 1.2816  # of a standard normal distribution
    ends = [_interval(rng.normal(size=100), quantile) for _ in range(100)]
    assert 0.85 <= sum(low <= truth <= high for low, high in ends) / 100 <= 0.99
    wide, narrow = (np.ptp(_interval(rng.normal(size=n), quantile)) for n in (25, 2500))
    assert wide > 3 * narrow
    assert _interval(np.full(9, 0.5), quantile) == pytest.approx((0.5, 0.5))
