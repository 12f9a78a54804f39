"""The space against scikit-learn, planted populations, and random gauges."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from diffcore.errors import IncompatibleModelError, UserError
from diffcore.run import Run, RunMap
from diffcore.testing.distributed import run_forked
from w2w_space.diagnose import cross_fitted, nearest_among_members, nearest_members, real_components
from w2w_space.gauge import Gauge, balanced, find_reference, joined, rotations
from w2w_space.layout import Layout
from w2w_space.population import Population, Stacked
from w2w_space.products import product_gram, relative_distance
from w2w_space.solve import best_solver
from w2w_space.space import WeightSpace, about

from .conftest import Toy, names, toy


def angles(one: Tensor, other: Tensor) -> Tensor:
    """Returns the principal angles between the row spaces of two matrices with orthonormal rows, in radians."""
    one, other = (torch.linalg.qr(part.double().T).Q for part in (one, other))
    # By sines, since cosines near 1 hold no digits of small angles.
    return torch.linalg.svdvals(other - one @ (one.T @ other)).clamp(max=1).arcsin()


def planted(members: int, factors: int, noise: float, seed: int = 0, size: int = 3) -> tuple[Population, Tensor]:
    g = torch.Generator().manual_seed(seed)
    layout = Layout.of({f"to_{i}": (30, 20) for i in range(size)}, rank=1)
    directions = torch.linalg.qr(torch.randn(layout.size, factors, generator=torch.Generator().manual_seed(9))).Q.T
    scores = torch.randn(members, factors, generator=g) * torch.linspace(3, 2, factors)
    matrix = scores @ directions + noise * torch.randn(members, layout.size, generator=g)
    return Population(layout, names(members), Stacked(matrix)), directions


@pytest.mark.parametrize("solver", ["gram", "covariance", "iterative"])
@pytest.mark.parametrize("block_size", [17, None])
def test_the_space_is_scikit_learns(solver, block_size):
    """Variances, subspaces and coordinates are those of its full PCA on standardised numbers, up to signs."""
    population, _ = planted(40, 5, 0.3)
    ours = WeightSpace.build(population, gauge="raw", num_components=12, solver=solver, block_size=block_size)
    x = population.vectors.columns(slice(0, population.layout.size)).double().numpy()
    z = (x - x.mean(0)) / x.std(0, ddof=1)
    theirs = PCA(12, svd_solver="full").fit(z)
    count = 5 if solver == "iterative" else 12  # on a flat tail, iterations find no more than its plane
    np.testing.assert_allclose(ours.variances[:count].numpy(), theirs.explained_variance_[:count], rtol=1e-6)
    assert angles(ours.components[:count], torch.from_numpy(theirs.components_[:count])).max() < 1e-3
    coefficients = torch.from_numpy(theirs.transform(z)) / torch.from_numpy(theirs.explained_variance_).sqrt()
    signs = torch.sign((coefficients[:, :count] * ours.members[:, :count]).sum(0))
    torch.testing.assert_close(ours.members[:, :count].double(), coefficients[:, :count] * signs, atol=2e-3, rtol=0)
    assert about(ours)["components"] == 12


@pytest.mark.parametrize("solver", ["gram", "covariance", "iterative"])
def test_parts_and_processes_give_the_space_of_one(solver, tmp_path: Path):
    """Streaming gives one space, whatever the blocks and parts, on one process and on two."""
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments import LightningEnvironment

    population = toy(members=30).gauged
    settings = {"solver": solver, "num_components": 5, "block_size": 150}
    alone = WeightSpace.build(population, **settings)
    parted = WeightSpace.build(population, **settings, parts=3)
    Run.open(tmp_path / "both", command="t", config={}).close()

    def on_rank(rank: int) -> tuple[Tensor, Tensor, Tensor]:
        fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp", plugins=[LightningEnvironment()])
        fabric.launch()
        with Run.open(tmp_path / "both", command="t", config={}) as run:
            space = WeightSpace.build(population, **settings, parts=2, map=RunMap(run, fabric))
        return space.components, space.members, space.mean

    for components, members, mean in [(parted.components, parted.members, parted.mean), *run_forked(on_rank)]:
        assert angles(components, alone.components).max() < 1e-4
        torch.testing.assert_close(members, alone.members, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(mean, alone.mean)
    assert parted.fit.alignment == alone.fit.alignment
    assert parted.fit.total_variance == pytest.approx(alone.fit.total_variance)


@pytest.mark.parametrize("gauge", ["raw", "canonical"])
def test_the_order_of_the_members_does_not_matter(gauge):
    """Looks at the components that stand out: on a flat tail there is no order to agree on."""
    population = toy(members=40).gauged
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1)).tolist()
    one, other = (WeightSpace.build(p, gauge=gauge, num_components=6) for p in (population, population.subset(order)))
    assert other.names == tuple(one.names[place] for place in order)
    torch.testing.assert_close(other.variances, one.variances, rtol=1e-6, atol=0)
    torch.testing.assert_close(other.mean, one.mean, rtol=1e-5, atol=1e-6)
    assert angles(other.components, one.components).max() < 1e-4
    torch.testing.assert_close(other.members, one.members[order], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("solver", ["gram", "covariance", "iterative"])
def test_new_members_do_not_move_the_vectors_of_old_ones(solver):
    """With gauge and scale kept, the space is that of all members at that scale."""
    made = toy(members=30).gauged
    earlier = WeightSpace.build(made.subset(range(20)), num_components=6)
    space = WeightSpace.build(made, like=earlier, num_components=6, solver=solver)
    assert torch.equal(space.scale, earlier.scale)
    assert torch.equal(space.gauge.reference, earlier.gauge.reference)
    z = (earlier.gauge(made.vectors.rows(range(30))).double() - earlier.mean) / earlier.scale
    z -= z.mean(0)
    values = torch.linalg.svdvals(z).square()[:6] / 29
    torch.testing.assert_close(space.variances[:3], values[:3], rtol=1e-5, atol=0)
    # The change of an old member that all components hold is what it was.
    whole = WeightSpace.build(made, like=earlier)
    assert relative_distance(made.layout, whole.vectors(whole.members[4]), made.vectors.rows([4])[0]) < 1e-3
    other = toy(members=5, rank=3).population
    with pytest.raises(IncompatibleModelError, match="another layout"):
        WeightSpace.build(other, like=earlier)


def test_coordinates_of_members_are_white_and_lead_back():
    """With all components, members come back as they were."""
    population, _ = planted(25, 5, 0.3)
    for scaling in ("standard", "module", "none"):
        space = WeightSpace.build(population, gauge="raw", scaling=scaling)
        assert space.num_components == 24
        torch.testing.assert_close(
            space.members.double().T @ space.members.double() / 24, torch.eye(24).double(), atol=1e-4, rtol=0
        )
        assert space.members.mean(0).abs().max() < 1e-5
        whole = population.vectors.rows(range(25))
        torch.testing.assert_close(space.vectors(space.members), whole, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(space.coordinates(whole), space.members, atol=1e-3, rtol=0)


def test_a_planted_subspace_is_recovered_the_better_the_more_members():
    """The largest angle to the planted subspace shrinks with the members, on numbers of one scale."""
    largest = []
    for members in (50, 200, 800):
        population, directions = planted(members, 5, 0.1)
        space = WeightSpace.build(population, gauge="raw", scaling="none", num_components=5)
        largest.append(float(angles(space.components, directions).max()))
    assert largest[0] > largest[1] > largest[2]
    assert largest[2] < 0.05


def test_chance_has_no_components_and_planted_ones_are_counted():
    population, _ = planted(120, 5, 0.2)
    space = WeightSpace.build(population, gauge="raw", scaling="none")
    assert real_components(population, space)[0] == 5
    g = torch.Generator().manual_seed(1)
    noise = Population(population.layout, names(60), Stacked(torch.randn(60, population.layout.size, generator=g)))
    assert real_components(noise, WeightSpace.build(noise, gauge="raw"))[0] <= 1


@pytest.mark.parametrize("kind", ["rank_one", "rank_three"])
def test_no_gauge_changes_the_space(kind, request):
    """A random gauge on every module of every member gives the same space and the same points."""
    made: Toy = request.getfixturevalue(kind)
    one, other = (WeightSpace.build(population, num_components=10) for population in (made.population, made.gauged))
    scale = one.mean.abs().max()
    assert (one.mean - other.mean).abs().max() < 1e-3 * scale
    torch.testing.assert_close(one.variances, other.variances, rtol=1e-3, atol=1e-3)
    signs = torch.sign((one.members * other.members).sum(0))
    assert (one.members - other.members * signs).abs().max() < 2e-2
    adapter = made.gauged.layout.adapter(made.gauged.vectors.rows([3])[0])
    again = made.population.layout.adapter(made.population.vectors.rows([3])[0])
    assert (one.project(adapter).z - one.project(again).z).abs().max() < 1e-2


def test_balanced_factors_have_the_same_product_and_equal_sides(rank_three: Toy):
    layout = rank_three.gauged.layout
    for place, span in enumerate(layout.spans):
        block = rank_three.gauged.vectors.columns(span).double()
        joint = balanced(layout, block, place)
        inputs = layout.sides[place][0]
        down, up = layout.split(block, place)
        torch.testing.assert_close(
            joint[:, inputs:] @ joint[:, :inputs].transpose(1, 2), up @ down, atol=1e-8, rtol=1e-8
        )
        inner = [part.transpose(1, 2) @ part for part in (joint[:, :inputs], joint[:, inputs:])]
        torch.testing.assert_close(inner[0], inner[1], atol=1e-8, rtol=1e-8)


def held_out_error(population: Population, gauge: str, k: int) -> float:
    """Returns the error of the products of the last third of the members after projection onto the others' space."""
    fitted, rest = (population.subset(range(*ends)) for ends in ((0, 150), (150, 200)))
    space = WeightSpace.build(fitted, gauge=gauge, num_components=k)
    vectors = rest.vectors.rows(range(len(rest)))
    back = space.vectors(space.coordinates(vectors))
    errors = [relative_distance(population.layout, *pair) for pair in zip(vectors, back, strict=True)]
    return float(np.sqrt(np.mean(np.square(errors))))


def test_the_gauge_matters_for_rank_one():
    """What six latent numbers decide is held by six components in the canonical gauge alone."""
    made = toy(spread=0.3)
    assert held_out_error(made.gauged, "canonical", 6) < 0.1
    assert held_out_error(made.gauged, "raw", 6) > 0.5
    z = WeightSpace.build(made.gauged, num_components=12).coordinates(made.gauged.vectors.rows(range(200)))
    raw = WeightSpace.build(made.gauged, gauge="raw", num_components=12).members
    assert probe(z, made.latents) > 0.9
    assert probe(raw, made.latents) < 0.8


def test_procrustes_holds_what_signs_alone_do_not():
    """At rank 3 with close singular values the form by SVD is not enough."""
    made = toy(rank=3, spread=0.3)
    assert held_out_error(made.gauged, "canonical", 6) < 0.15
    # The form of the singular value decomposition, signs fixed, but no rotation to a reference.
    layout, rows = made.gauged.layout, made.gauged.vectors.rows(range(200))
    parts = []
    for place, span in enumerate(layout.spans):
        joint = balanced(layout, rows[:, span], place)
        inputs = layout.sides[place][0]
        signs = torch.sign(joint.gather(1, joint.abs().argmax(1, keepdim=True)))
        joint = joint * signs
        parts += [joint[:, :inputs].transpose(1, 2).flatten(1), joint[:, inputs:].flatten(1)]
    assert held_out_error(Population(layout, names(200), Stacked(torch.cat(parts, 1))), "raw", 6) > 0.25


def probe(z: Tensor, latents: Tensor) -> float:
    """Returns the accuracy of a linear probe for the sign of the first latent on the last third of the members."""
    x = torch.cat([z.double(), torch.ones(len(z), 1).double()], 1)
    y = torch.sign(latents[:, 0]).double()
    fitted = torch.linalg.lstsq(x[:150], y[:150, None]).solution
    return float((torch.sign(x[150:] @ fitted)[:, 0] == y[150:]).double().mean())


def test_products_without_products():
    """Inner products are those of the formed changes, which it never forms."""
    for rank in (1, 3):
        made = toy(members=6, rank=rank)
        layout, rows = made.gauged.layout, made.gauged.vectors.rows(range(6)).double()
        whole = torch.cat([(up @ down).flatten(1) for down, up in layout.factors(rows).values()], 1)
        torch.testing.assert_close(product_gram(layout, rows), whole @ whole.T, rtol=1e-12, atol=1e-8)
        expected = float((whole[0] - whole[1]).norm() / whole[0].norm())
        assert relative_distance(layout, rows[0].float(), rows[1].float()) == pytest.approx(expected, rel=1e-5)


def test_held_out_coordinates_are_those_of_spaces_without_the_member():
    population, _ = planted(30, 4, 0.5)
    whole = WeightSpace.build(population, gauge="raw", scaling="none")
    space, shrinkage = cross_fitted(whole, num_components=6, folds=30)
    member = 11
    others = [i for i in range(30) if i != member]
    apart = WeightSpace.build(population.subset(others), gauge="raw", scaling="none", num_components=6)
    vector = population.vectors.rows([member])
    there = apart.vectors(apart.coordinates(vector))
    expected = ((there - whole.mean) @ whole.components[:6].T / whole.sigma[:6])[0]
    torch.testing.assert_close(space.held_out[member], expected, atol=1e-3, rtol=1e-3)
    assert 0.2 < space.shrinkage < 1
    assert shrinkage.ratios[-1] == space.shrinkage
    assert shrinkage.ratios[0] > shrinkage.ratios[-1]  # later components hold more of the members' own noise
    with pytest.raises(UserError, match="build it with all"):
        cross_fitted(space)


def test_unshrunk_projections_are_longer():
    population, _ = planted(60, 4, 0.5)
    space, _ = cross_fitted(WeightSpace.build(population, gauge="raw", scaling="none"), num_components=6)
    other, _ = planted(3, 4, 0.5, seed=5)
    adapter = other.layout.adapter(other.vectors.rows([0])[0])
    point, longer = space.project(adapter), space.project(adapter, unshrink=True)
    assert longer.length == pytest.approx(point.length / space.shrinkage)
    assert point.residual is not None
    assert 0 < point.residual < 1


def test_the_nearest_member_of_a_member_is_itself():
    population, _ = planted(20, 4, 0.5)
    space = WeightSpace.build(population)
    found, distances, cosines = nearest_members(space, space.members[:3])
    assert found == list(space.names[:3])
    assert distances.max() < 1e-2
    assert cosines.min() > 0.999
    apart = torch.cdist(space.members, space.members) + 1e9 * torch.eye(20)
    torch.testing.assert_close(nearest_among_members(space), apart.min(1).values)


def test_odd_populations():
    layout = Layout.of({"to_q": (4, 3), "to_v": (4, 3)}, rank=1)
    g = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, layout.size, generator=g)

    def build(rows: Tensor, **settings) -> WeightSpace:
        return WeightSpace.build(Population(layout, names(len(rows)), Stacked(rows)), **settings)

    with pytest.raises(UserError, match="there are 2 adapters; a space needs at least 3"):
        build(matrix[:2])
    with pytest.raises(UserError, match="all adapters are equal"):
        build(matrix[:1].expand(5, -1))
    with pytest.raises(UserError, match="vector of 'member 1' has values that are NaN"):
        build(torch.cat([matrix[:1], matrix[1:2] * float("nan"), matrix[2:]]))
    with pytest.raises(UserError, match="`num_components` is 0"):
        build(matrix, num_components=0)
    assert build(matrix, num_components=100).num_components == 4
    constant = matrix.clone()
    constant[:, 2] = 7.0
    space = build(constant, gauge="raw")
    assert space.fit.constant == 1
    assert space.vectors(space.members).isfinite().all()
    still = matrix.clone()
    still[2, : layout.spans[0].stop] = 0
    space = build(still)
    assert [row.zero for row in space.fit.alignment] == [1, 0]
    assert space.vectors(space.members).isfinite().all()
    bare = space.without_members()
    assert len(bare.members) == 0
    with pytest.raises(UserError, match="without its members"):
        bare.member("member 0")
    with pytest.raises(UserError, match="has no member 'x'"):
        space.member("x")
    with pytest.raises(ValueError, match="`z` has shape"):
        space.point(torch.zeros(9))
    assert space.fingerprint != build(matrix).fingerprint
    assert space.fingerprint == build(still).fingerprint


def test_ties_with_the_reference_are_counted():
    layout = Layout.of({"to_q": (2, 2)}, rank=1)
    joint = joined(layout, torch.tensor([[1.0, 0, 1, 0], [0, 1.0, 0, 1], [-1.0, 0, -1, 0]]), 0)
    reference = find_reference(torch.cat([joint[:1], joint[2:]]))
    turns = rotations(joint, reference)
    assert turns.ties.tolist() == [False, True, False]
    assert turns.matrices[0, 0, 0] == -turns.matrices[2, 0, 0]
    gauge = Gauge(layout, torch.tensor([1.0, 0, 1, 0]))
    torch.testing.assert_close(gauge(torch.tensor([[-2.0, 0, -0.5, 0]])), torch.tensor([[1.0, 0, 1, 0]]))


def test_the_iterative_way_never_forms_inner_products_of_all_pairs(monkeypatch):
    """A table of 65 000 x 65 000 is what it is there to avoid."""
    population, _ = planted(60, 4, 0.2)

    def refused(*_):
        raise AssertionError("a table of all pairs was formed")

    monkeypatch.setattr("w2w_space.space.gram", refused)
    assert WeightSpace.build(population, num_components=4, solver="iterative").num_components == 4
    with pytest.raises(AssertionError, match="all pairs"):
        WeightSpace.build(population, num_components=4, solver="gram")


def test_the_smallest_table_is_taken_and_none_where_all_are_large():
    assert best_solver(1000, 99_648) == "gram"
    assert best_solver(5000, 2816) == "covariance"
    assert best_solver(65_000, 99_648) == "iterative"
    assert best_solver(65_000, 2816) == "covariance"
