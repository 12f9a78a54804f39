"""Refinement outside the space, where points lie, and samples drawn from an autoencoder's posterior."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffcore.adapters.fusing import fuse
from diffcore.denoiser import NetworkDenoiser
from diffcore.errors import UserError
from diffcore.models import DiffusionModel
from diffcore.testing import tiny
from diffcore.train.timesteps import uniform_timesteps
from w2w_space.directions import find_directions
from w2w_space.instance import Deck, Errors, Instance, NoisyBatch
from w2w_space.invert import InversionSettings
from w2w_space.labels import Labels
from w2w_space.locate import locate
from w2w_space.population import Population, Stacked
from w2w_space.recipe import layout_for
from w2w_space.refine import refine
from w2w_space.space import WeightSpace

SHORT = InversionSettings(steps=30, batch_size=4, check_every=5, num_pairs=4)


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    found = tiny.model("dit")
    found.backbone.double().requires_grad_(False)
    return found


@pytest.fixture(scope="module")
def space(model: DiffusionModel) -> WeightSpace:
    layout = layout_for(model, ("to_q", "to_v", "to_out.0"), 1)
    g = torch.Generator().manual_seed(0)
    matrix = 0.3 * torch.randn(layout.size, generator=g) + 0.2 * torch.randn(20, layout.size, generator=g)
    names = tuple(f"member {i}" for i in range(20))
    return WeightSpace.build(Population(layout, names, Stacked(matrix)), gauge="raw", num_components=6)


def subjects(model: DiffusionModel, count: int) -> list[Instance]:
    g = torch.Generator().manual_seed(3)
    return [
        Instance(f"subject {i}", torch.randn(2, *model.shape, generator=g), {"class_labels": torch.tensor([i])})
        for i in range(count)
    ]


def taught_by(model: DiffusionModel, space: WeightSpace, vector: Tensor) -> Errors:
    """Errors against the outputs of an adapter."""
    old = model.denoiser
    network = fuse(model.backbone, space.layout.adapter(vector).modules)
    teacher = NetworkDenoiser(network, old.schedule, old.prediction_type, call=old.call)

    def errors(denoiser: NetworkDenoiser, batch: NoisyBatch) -> Tensor:
        x_t = batch.x_t(denoiser)
        with torch.no_grad():
            target = teacher(x_t, batch.t, batch.condition).output
        return batch.masked_means((denoiser(x_t, batch.t, batch.condition).output - target).square())

    return errors


def test_refinement_finds_what_lies_outside_and_leaves_the_coordinates(model: DiffusionModel, space: WeightSpace):
    g = torch.Generator().manual_seed(5)
    point = space.point(torch.randn(6, generator=g))
    outside = torch.randn(space.layout.size, generator=g)
    outside -= (outside @ space.components.T) @ space.components
    errors = taught_by(model, space, point.vector + 0.5 * space.scale * outside)
    settings = replace(SHORT, steps=40, batch_size=2)
    people = subjects(model, 1)
    free = refine([point], model, people, settings, radius=5.0, penalty=0.0, learning_rate=0.05, errors=errors)
    assert float(free.losses[0]) < 0.3 * float(free.start_losses[0])
    assert (space.coordinates(free.vectors)[0] - point.z).abs().max() < 1e-4
    held = refine([point], model, people, settings, radius=0.02, penalty=0.0, learning_rate=0.05, errors=errors)
    assert float(held.departures[0]) == pytest.approx(0.02, rel=1e-3)
    assert float(free.departures[0]) > 2 * 0.02
    assert float(held.outside[0]) < float(free.outside[0])
    # With a strong penalty the departure costs more than it explains.
    drawn = refine([point], model, people, settings, radius=5.0, penalty=100.0, learning_rate=0.05, errors=errors)
    assert float(drawn.departures[0]) < 0.5 * float(free.departures[0])


def test_refined_together_equals_refined_alone(model: DiffusionModel, space: WeightSpace):
    people, settings = subjects(model, 2), replace(SHORT, steps=4, check_every=2, num_pairs=2)
    points = [space.point(), space.member("member 3")]
    together = refine(points, model, people, settings)
    alone = refine(points, model, people, settings, group_size=1)
    # With a bound that both reach.
    near = [refine(points, model, people, settings, radius=0.004, group_size=size) for size in (1, 2)]
    assert near[1].departures.tolist() == pytest.approx([0.004] * 2, rel=1e-4)
    assert (near[0].vectors - near[1].vectors).abs().max() < 1e-5
    assert (together.vectors - alone.vectors).abs().max() < 1e-5
    assert (together.losses - alone.losses).abs().max() < 1e-8
    assert bool((together.losses <= together.start_losses).all())
    for i, point in enumerate(points):
        moved = (together.vectors[i] - point.vector) / space.scale
        assert float(moved.square().mean().sqrt()) == pytest.approx(float(together.departures[i]), abs=1e-5)


def test_bad_refinements_are_refused(model: DiffusionModel, space: WeightSpace):
    people = subjects(model, 2)
    with pytest.raises(UserError, match="1 points for 2 subjects"):
        refine([space.point()], model, people)
    with pytest.raises(UserError, match="different spaces"):
        refine([space.point(), space.truncated(3).point()], model, people)
    for bad in ({"radius": 0.0}, {"penalty": -1.0}, {"learning_rate": 0.0}):
        with pytest.raises(UserError, match=next(iter(bad))):
            refine([space.point()] * 2, model, people, **bad)


def test_a_point_is_located_among_the_members(space: WeightSpace):
    ages = [float(space.members[i, 0]) for i in range(20)]
    known = find_directions(space, Labels.of(space.names, {"age": ages}))
    oldest = max(range(20), key=lambda i: ages[i])
    where = locate(space.member(space.names[oldest]), known)
    assert where.nearest[0] == (space.names[oldest], 0.0)
    assert where.places["age"].percentile > 85
    assert where.places["age"].std > 1
    assert where.words == f"age {words_of(where.places['age'].percentile)} percentile"
    middle = locate(space.point(), known)
    assert middle.length == 0
    assert middle.percentile == 0
    assert middle.words == "usual in all attributes"
    assert middle.usual == pytest.approx(float(space.members.norm(dim=1).median()), rel=0.2)


def words_of(percentile: float) -> str:
    """The oldest of 20 members has 95 % of them below."""
    return {95.0: "95th", 100.0: "above 99th"}[percentile]


def test_points_are_compared_with_held_out_members_as_a_search_finds_them(space: WeightSpace):
    """Held-out rows at half the members' length: a point as long as the members is usual, not far out."""
    fitted = replace(space, held_out=0.5 * space.members, shrinkage=0.5)
    point = space.point(space.members.norm(dim=1).median() * torch.eye(6)[0])
    assert locate(point).percentile == pytest.approx(50, abs=10)
    assert locate(fitted.point(point.z)).percentile == pytest.approx(50, abs=10)
    assert locate(fitted.point(point.z)).usual == pytest.approx(locate(point).usual)


def test_a_point_on_a_bound_is_told(space: WeightSpace):
    settings = InversionSettings(max_std=3.0, max_length=None)
    edge, inside = torch.tensor([3.0, 0, 0, 0, 0, 0]), torch.tensor([2.9, 0, 0, 0, 0, 0])
    assert locate(space.point(edge), settings=settings).at_bound
    assert not locate(space.point(inside), settings=settings).at_bound
    assert not locate(space.point(edge)).at_bound
    sphere = InversionSettings(max_std=None, max_length=1.2)
    assert locate(space.point(edge), num_components=6, settings=sphere).at_bound  # 1.2 sqrt(6) = 2.94
    assert not locate(space.point(inside), num_components=6, settings=sphere).at_bound
    assert locate(space.point(inside), num_components=4, settings=sphere).at_bound  # 1.2 sqrt(4) = 2.4
    alone = locate(space.without_members().point(edge))
    assert alone.nearest == ()
    assert alone.percentile != alone.percentile


def test_samples_are_drawn_from_the_posterior_each_time():
    x0, std = torch.full((2, 1, 4, 4), 3.0), torch.full((2, 1, 4, 4), 0.5)
    std[:, :, :2] = 0.0
    blurred = Instance("a", x0, {}, None, std)
    exact = Instance("b", x0)
    assert blurred.digest != Instance("a", x0).digest

    def deck(*people: Instance) -> Deck:
        return Deck(people, uniform_timesteps(1000), seed=0, antithetic=False, like=torch.empty(()))

    both = deck(exact, blurred)
    rows = torch.stack([both.deal(8, step).x0 for step in range(200)])
    assert bool((rows[:, :8] == 3.0).all())
    drawn = rows[:, 8:]
    assert bool((drawn[..., :2, :] == 3.0).all())
    free = drawn[..., 2:, :]
    error = 0.5 / free.numel() ** 0.5
    assert abs(float(free.mean()) - 3.0) < 4 * error
    assert abs(float(free.std()) - 0.5) < 4 * error
    assert torch.equal(deck(blurred).deal(8, 7).x0, both.deal(8, 7).x0[8:])
    assert torch.equal(both.deal(8, 7).noise, deck(exact, Instance("a", x0)).deal(8, 7).noise)
