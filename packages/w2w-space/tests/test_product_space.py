"""The space of changes against changes that are formed, and against the factors' space where the two agree."""

import pytest
import torch
from torch import Tensor

from diffcore.adapters import Adapter
from diffcore.errors import UserError
from w2w_space.diagnose import cross_fitted
from w2w_space.directions import find_directions
from w2w_space.edit import edit
from w2w_space.labels import Labels
from w2w_space.layout import Layout
from w2w_space.population import Population, Stacked
from w2w_space.product_space import ProductSpace
from w2w_space.ranks import at_rank
from w2w_space.sample import sample

from .conftest import Toy, names

SHAPES = {"a.to_q": (6, 5), "b.to_v": (4, 7)}


def drawn(members: int, rank: int, seed: int = 0) -> Population:
    layout = Layout.of(SHAPES, rank=rank)
    matrix = torch.randn(members, layout.size, generator=torch.Generator().manual_seed(seed))
    return Population(layout, names(members), Stacked(matrix))


def changes(layout: Layout, vectors: Tensor) -> Tensor:
    """Returns the changes of all modules as one row of numbers for each vector."""
    return torch.cat([(up @ down).flatten(1).double() for down, up in layout.factors(vectors).values()], 1)


@pytest.mark.parametrize("rank", [1, 2])
def test_the_space_is_that_of_the_formed_changes(rank):
    """Variances, members, and projections of adapters that are no members are those of explicit products."""
    population = drawn(12, rank)
    space = ProductSpace.build(population, num_components=6, rank=30)
    formed = changes(population.layout, population.vectors.rows(range(12)))
    mean = formed.mean(0)
    _, values, components = torch.linalg.svd(formed - mean, full_matrices=False)
    torch.testing.assert_close(space.variances, values[:6].square() / 11)
    new = drawn(4, rank, seed=1)
    rows = new.vectors.rows(range(4))
    wanted = (changes(new.layout, rows) - mean) @ components[:6].T / space.variances.sqrt()
    found = space.coordinates(rows).double()
    signs = torch.sign((wanted * found).sum(0))
    torch.testing.assert_close(found * signs, wanted, atol=1e-5, rtol=1e-5)
    # The change of a point is that of its coordinates, and what is left over is told.
    point = space.project(new.layout.adapter(rows[2]))
    truth = mean + (wanted[2] * space.variances.sqrt()) @ components[:6]
    made = changes(space.layout, point.vector[None])[0]
    torch.testing.assert_close(made, truth, atol=1e-5, rtol=1e-5)
    apart = changes(new.layout, rows[2:3])[0] - truth
    assert point.residual == pytest.approx(float(apart.norm() / changes(new.layout, rows[2:3])[0].norm()), rel=1e-4)


def test_no_gauge_changes_it_and_ranks_may_differ(rank_three: Toy):
    one, other = (ProductSpace.build(p, num_components=5) for p in (rank_three.population, rank_three.gauged))
    torch.testing.assert_close(one.variances, other.variances, rtol=1e-3, atol=0)
    torch.testing.assert_close(one.members, other.members, atol=1e-2, rtol=0)
    layout = rank_three.population.layout
    member = layout.adapter(rank_three.population.vectors.rows([3])[0])
    torch.testing.assert_close(one.project(member).z, one.members[3], atol=1e-2, rtol=0)
    # The same change, written at a higher rank.
    more = {name: at_rank(change, layout.rank + 2)[0] for name, change in member.modules.items()}
    torch.testing.assert_close(one.project(Adapter(more)).z, one.members[3], atol=1e-2, rtol=0)


def test_directions_edits_and_samples_work_in_it():
    g = torch.Generator().manual_seed(0)
    layout, amounts = Layout.of(SHAPES, rank=1), torch.randn(60, generator=g)
    base = torch.randn(layout.size, generator=g)
    # The label scales the changes, which are linear in it.
    matrix = base + 0.05 * torch.randn(60, layout.size, generator=g)
    for _, up in layout.factors(matrix).values():
        up *= (2 + amounts)[:, None, None]
    whole = ProductSpace.build(Population(layout, names(60), Stacked(matrix)))
    space, shrinkage = cross_fitted(whole, num_components=8)
    assert 0 < shrinkage.ratios[-1] < 1.2
    found = find_directions(space, Labels.of(space.names, {"size": amounts.tolist()}))
    before = space.point()
    after = edit(before, {"size": 2.0}, found).point
    norms = [changes(space.layout, p.vector[None]).norm() for p in (before, after)]
    assert norms[1] / norms[0] == pytest.approx(2.0, abs=0.3)
    assert len(sample(space, 3)) == 3


def test_what_cannot_be_is_refused():
    population = drawn(5, 1)
    with pytest.raises(UserError, match="at least 3"):
        ProductSpace.build(population.subset([0, 1]))
    same = Population(population.layout, names(4), Stacked(population.vectors.rows([0, 0, 0, 0])))
    with pytest.raises(UserError, match="equal"):
        ProductSpace.build(same)
    with pytest.raises(UserError, match="cannot be written without"):
        ProductSpace.build(population).without_members()
    broken = population.vectors.rows(range(5)).clone()
    broken[3, 2] = torch.nan
    with pytest.raises(UserError, match="'member 3'"):
        ProductSpace.build(Population(population.layout, names(5), Stacked(broken)))
