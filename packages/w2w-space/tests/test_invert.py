"""Inversion and its comparison with free adapters."""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore.adapters.fusing import fuse
from diffcore.denoiser import NetworkDenoiser
from diffcore.errors import UserError
from diffcore.models import DiffusionModel
from diffcore.run import Run, RunMap
from diffcore.testing import tiny
from w2w_space.baseline import free_adapters
from w2w_space.instance import Errors, Instance, NoisyBatch, denoising_errors
from w2w_space.invert import InversionSettings, bound, default_components, invert
from w2w_space.population import Population, Stacked
from w2w_space.recipe import layout_for
from w2w_space.space import WeightSpace

SHORT = InversionSettings(num_components=3, steps=6, check_every=2, num_pairs=4)


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    found = tiny.model("dit")
    found.backbone.double().requires_grad_(False)
    return found


@pytest.fixture(scope="module")
def space(model: DiffusionModel) -> WeightSpace:
    """Six planted components and nothing else."""
    layout = layout_for(model, ("to_q", "to_k", "to_v", "to_out.0", "0.proj"), 1)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(6, layout.size, generator=generator)
    z = torch.randn(40, 6, generator=generator)
    matrix = 0.3 * torch.randn(layout.size, generator=generator) + 0.1 * z @ directions
    names = tuple(f"member {i}" for i in range(len(matrix)))
    return WeightSpace.build(Population(layout, names, Stacked(matrix)), gauge="raw", num_components=6)


def subjects(model: DiffusionModel, count: int, pictures: int = 1) -> list[Instance]:
    generator = torch.Generator().manual_seed(3)
    return [
        Instance(
            f"subject {i}",
            torch.randn(pictures, *model.shape, generator=generator),
            {"class_labels": torch.tensor([i])},
        )
        for i in range(count)
    ]


def teacher(space: WeightSpace, model: DiffusionModel, planted: Tensor) -> Errors:
    """Errors against the outputs of the planted adapters, group by group."""
    networks = [fuse(model.backbone, space.point(z).adapter().modules) for z in planted]
    old = model.denoiser
    taught = [NetworkDenoiser(each, old.schedule, old.prediction_type, call=old.call) for each in networks]

    def errors(denoiser: NetworkDenoiser, batch: NoisyBatch) -> Tensor:
        x_t = batch.x_t(denoiser)
        rows = torch.arange(len(x_t)).chunk(len(taught))
        with torch.no_grad():
            target = torch.cat(
                [
                    one(x_t[part], batch.t[part], {k: v[part] for k, v in batch.condition.items()}).output
                    for one, part in zip(taught, rows, strict=True)
                ]
            )
        return batch.masked_means((denoiser(x_t, batch.t, batch.condition).output - target).square())

    return errors


def test_targets_of_a_teacher_recover_the_planted_points(model: DiffusionModel, space: WeightSpace):
    planted = torch.randn(2, 6, generator=torch.Generator().manual_seed(7)).clamp(-1.5, 1.5)
    settings = replace(SHORT, num_components=6, steps=350, check_every=350, learning_rate=0.2, prior=0.0)
    found = invert(space, model, subjects(model, 2), settings, errors=teacher(space, model, planted))
    z = torch.stack([point.z for point in found.points])
    assert (z - planted).abs().max() < 1e-5
    assert bool((found.losses < 1e-8 * found.start_losses).all())


def test_searches_together_equal_searches_alone(model: DiffusionModel, space: WeightSpace):
    people = subjects(model, 2, pictures=2)
    settings = replace(SHORT, restarts=2, start="nearest", num_pairs=2)
    together = invert(space, model, people, settings)
    alone = invert(space, model, people[::-1], settings, group_size=1)
    for i, point in enumerate(together.points):
        assert (point.z - alone.points[1 - i].z).abs().max() < 1e-6
        assert point.z[3:].eq(0).all()
        assert point.z[:3].any()
    assert (together.losses - alone.losses.flip(0)).abs().max() < 1e-10
    assert together.history.shape == (2, 4)


def test_the_best_point_on_the_fixed_pairs_is_kept(model: DiffusionModel, space: WeightSpace):
    wild = replace(SHORT, learning_rate=2.0, steps=12)
    found = invert(space, model, subjects(model, 2), wild)
    assert torch.equal(found.losses, found.history.min(1).values)
    assert torch.equal(found.steps, 2 * found.history.argmin(1))
    assert torch.equal(found.start_losses, found.history[:, 0])
    assert bool((found.history[:, -1] > found.losses).any())


def test_the_search_stops_when_the_loss_stands_still(model: DiffusionModel, space: WeightSpace):
    patient = replace(SHORT, learning_rate=1e-6, steps=12, patience=4)
    found = invert(space, model, subjects(model, 1), patient)
    assert found.history[0].isfinite().tolist() == [True, True, True, False, False, False, False]


def test_a_search_that_has_ended_does_not_go_on_for_its_neighbour(model: DiffusionModel, space: WeightSpace):
    def errors(denoiser: NetworkDenoiser, batch: NoisyBatch) -> Tensor:
        found = denoising_errors(denoiser, batch)
        first = torch.arange(len(found)) < len(found) // 2
        return torch.where(first, 1 + 0 * found, found)  # the first subject's loss never moves

    settings = replace(SHORT, num_components=6, learning_rate=0.5, steps=12, patience=4)
    found = invert(space, model, subjects(model, 2), settings, errors=errors)
    assert found.history[0].isfinite().tolist() == [True, True, True, False, False, False, False]
    assert bool(found.history[1, :4].isfinite().all())
    assert found.points[0].z.eq(0).all()


def test_prior_and_bounds_keep_the_solution_where_members_are(model: DiffusionModel, space: WeightSpace):
    free = replace(
        SHORT, num_components=6, steps=24, check_every=8, learning_rate=0.6, prior=0.0, max_std=None, max_length=None
    )
    (loose,) = invert(space, model, subjects(model, 1), free).points
    held = replace(free, prior=1e-3, max_std=3.0, max_length=1.2)
    (kept,) = invert(space, model, subjects(model, 1), held).points
    shell = 1.2 * 6**0.5
    assert loose.length > 1.5 * shell
    assert kept.length <= shell * (1 + 1e-6)
    (box,) = invert(space, model, subjects(model, 1), replace(free, max_std=0.5)).points
    assert float(box.z.abs().max()) <= 0.5
    assert float(box.z.abs().max()) > 0.49
    (drawn,) = invert(space, model, subjects(model, 1), replace(free, prior=10.0)).points
    assert drawn.length < 0.5 * loose.length


def test_bounds_clamp_coordinates_and_then_the_length():
    z = torch.tensor([[9.0, -9.0, 0.1, 0.0], [0.5, 0.5, 0.5, 0.5]])
    bound(z, 3.0, 1.2)
    assert z[0].norm() == pytest.approx(2.4)
    assert float(z[0, 0] / z[0, 2]) == pytest.approx(30.0)
    assert z[1].tolist() == [0.5, 0.5, 0.5, 0.5]


def test_steps_vanish_in_bfloat16_and_not_in_float32():
    """The authors' coefficients are bfloat16: a step of .1 from 60 towards 120 is less than half a spacing."""
    moved = {}
    for dtype in (torch.bfloat16, torch.float32):
        beta = torch.full((1,), 60.0, dtype=dtype, requires_grad=True)
        optimizer = torch.optim.Adam([beta], lr=0.1)
        for _ in range(400):
            optimizer.zero_grad()
            (beta - 120).square().sum().backward()
            optimizer.step()
        moved[dtype] = float(beta.detach())
    assert moved[torch.bfloat16] == 60.0
    assert moved[torch.float32] > 90.0


def test_coordinates_are_float32_whatever_the_network_is(space: WeightSpace):
    model = tiny.model("dit")
    model.backbone.bfloat16()
    found = invert(space, model, subjects(model, 1), replace(SHORT, learning_rate=0.1, steps=20))
    z = found.points[0].z
    assert z.dtype == torch.float32
    assert not torch.equal(z, z.bfloat16().float())


def test_a_mask_changes_what_is_explained(model: DiffusionModel, space: WeightSpace):
    (person,) = subjects(model, 1)
    mask = torch.zeros(1, 1, *model.shape[1:])
    mask[..., : model.shape[2] // 2] = 1.0
    cases = person, replace(person, mask=mask), replace(person, mask=mask / 2)
    plain, masked, half = (invert(space, model, [each], SHORT) for each in cases)
    assert (plain.points[0].z - masked.points[0].z).abs().max() > 1e-3
    assert torch.allclose(masked.losses, half.losses)


def test_free_adapters_take_the_same_budget(model: DiffusionModel, space: WeightSpace):
    people = subjects(model, 2)
    free = free_adapters(space.layout, model, people, replace(SHORT, steps=30), learning_rate=3e-2)
    assert [member.name for member in free] == ["subject 0", "subject 1"]
    assert all(len(member.history) == 30 for member in free)
    assert all(member.vector.shape == (space.layout.size,) for member in free)
    assert all(member.gain > 0 for member in free)


def test_bad_settings_are_refused(model: DiffusionModel, space: WeightSpace):
    people = subjects(model, 1)
    assert default_components(space) == 6
    assert default_components(space, share=0.05) == 2
    (short,) = invert(space, model, people, replace(SHORT, num_components=None, component_share=0.05)).points
    assert short.z.ne(0).tolist() == [True, True, False, False, False, False]
    for bad in ({"component_share": 0.0}, {"steps": 0}, {"learning_rate": 0.0}, {"prior": -1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            replace(SHORT, **bad)
    with pytest.raises(UserError, match="the space has 6"):
        invert(space, model, people, replace(SHORT, num_components=7))
    with pytest.raises(UserError, match="no instances"):
        invert(space, model, [], SHORT)
    with pytest.raises(UserError, match="without its members"):
        invert(space.without_members(), model, people, replace(SHORT, start="nearest"))


def test_a_search_is_kept_by_all_that_it_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What a run holds of one subject is not taken for that of other pictures, settings or spaces."""
    module: Any = importlib.import_module("w2w_space.invert")  # the package's attribute is the function
    searched, real = list[str](), module._search
    monkeypatch.setattr(module, "_search", lambda *args: searched.extend(s.name for s in args[2]) or real(*args))
    model = tiny.model("unet2d")
    layout = layout_for(model, ("to_q",), rank=1)
    g = torch.Generator().manual_seed(0)
    vectors = torch.randn(6, layout.size, generator=g)
    space = WeightSpace.build(Population(layout, tuple("abcdef"), Stacked(vectors)))
    one = Instance("me", torch.randn(1, *model.shape, generator=g), {"class_labels": torch.tensor([3])})
    short = InversionSettings(steps=1, batch_size=2, num_pairs=2, check_every=1, num_components=2)
    with Run.open(tmp_path / "run", command="t", config={}) as run:
        for what, changed, new in (
            ("first", {}, True),
            ("same", {}, False),
            ("picture", {"subject": replace(one, x0=one.x0 + 1)}, True),
            ("class", {"subject": replace(one, condition={"class_labels": torch.tensor([4])})}, True),
            ("steps", {"settings": replace(short, steps=2)}, True),
            ("seed", {"settings": replace(short, seed=1)}, True),
            ("components", {"settings": replace(short, num_components=3)}, True),
            ("space", {"space": space.truncated(3)}, True),
            ("same", {}, False),
        ):
            searched.clear()
            asked = {"space": space, "subject": one, "settings": short} | changed
            invert(asked["space"], model, [asked["subject"]], asked["settings"], map=RunMap(run))
            assert bool(searched) == new, what
