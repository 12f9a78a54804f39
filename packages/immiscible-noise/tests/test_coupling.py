"""A coupling does what the functions behind it do, and names itself."""

import pytest
import torch

from immiscible_noise import PRESETS, Coupling, assign_noise, select_noise

X, NOISE = (torch.randn(24, 2, 3, 3, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
LABELS = torch.arange(24) % 3


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(2)


def test_vanilla_keeps_the_independent_draw():
    assert Coupling("vanilla")(X, NOISE, labels=LABELS, generator=seeded()) is NOISE


@pytest.mark.parametrize(
    "options", [{}, {"strength": 0.5}, {"cost": "l2"}, {"strength": 0.25, "condition": "block"}], ids=str
)
def test_assignment_hands_its_settings_to_assign_noise(options: dict):
    found = Coupling("assignment", **options)(X, NOISE, labels=LABELS, generator=seeded())
    assert torch.equal(found, assign_noise(X, NOISE, labels=LABELS, generator=seeded(), **options))
    assert not torch.equal(found, NOISE)


def test_ignoring_labels_is_another_assignment():
    with pytest.warns(UserWarning, match="condition='ignore'"):
        ignored = PRESETS["ignore"](X, NOISE, labels=LABELS)
    assert torch.equal(ignored, assign_noise(X, NOISE))
    assert not torch.equal(ignored, PRESETS["assignment"](X, NOISE, labels=LABELS))


def test_a_mask_reaches_the_assignment():
    mask = torch.zeros(24, 2, 3, 3)
    mask[:, :, 0] = 1
    assert torch.equal(Coupling()(X, NOISE, mask=mask), assign_noise(X, NOISE, mask=mask))


@pytest.mark.parametrize("score", ["l2", "inner"])
def test_nearest_of_k_draws_its_own_noise(score: str):
    found = Coupling("knn", k=3, score=score)(X, NOISE, generator=seeded())
    assert torch.equal(found, select_noise(X, 3, score=score, generator=seeded()))


def test_presets_go_by_their_names_and_others_by_what_differs():
    assert [coupling.name for coupling in PRESETS.values()] == [*PRESETS]
    assert Coupling("assignment", strength=0.25, cost="l2").name == "assignment-strength=0.25-cost=l2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 1.5}, "`strength` is 1.5"),
        ({"k": 0}, "`k` is 0"),
        ({"window": -1}, "`window` is -1"),
        ({"scope": "global", "window": 8}, "`scope` is global and `window` is 8"),
        ({"scope": "global", "condition": "soft"}, "`scope` is global and `condition` is soft"),
        ({"method": "knn", "strength": 0.5}, "`strength` is 0.5, which method knn does not have"),
        ({"method": "vanilla", "scope": "global"}, "`scope` is global, which method vanilla does not have"),
        ({"k": 8}, "`k` is 8, which method assignment does not have; leave it out, or take `method` knn"),
    ],
)
def test_settings_out_of_range(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Coupling(**options)
