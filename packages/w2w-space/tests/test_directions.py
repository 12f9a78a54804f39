"""Directions, edits and samples on planted attributes, and against scikit-learn."""

from dataclasses import dataclass, replace

import pytest
import torch
from sklearn.linear_model import LinearRegression, Ridge
from torch import Tensor

from diffcore.errors import UserError
from w2w_space.diagnose import cross_fitted
from w2w_space.directions import Directions, bootstrapped, find_directions
from w2w_space.edit import edit
from w2w_space.labels import Labels
from w2w_space.layout import Layout
from w2w_space.population import Population, Stacked
from w2w_space.sample import described, sample, slerp
from w2w_space.space import WeightSpace

from .conftest import names

ATTRIBUTES = ("age", "beard", "hat")


@dataclass(frozen=True)
class Planted:
    """A space whose members' vectors are sums of what three correlated attributes add, and of a falling spectrum.

    Attributes:
        space: The space of 60 components.
        labels: Whether each member has each attribute, as -1 and 1.
        effects: What each attribute adds to the vector, one row each.
    """

    space: WeightSpace
    labels: Labels
    effects: Tensor


@pytest.fixture(scope="module")
def planted() -> Planted:
    g = torch.Generator().manual_seed(0)
    layout = Layout.of({"to_q": (100, 100)}, rank=1)
    basis = torch.linalg.qr(torch.randn(layout.size, 60, generator=g)).Q.T
    spectrum = torch.linspace(0, -3, 60).exp()
    mixing = torch.tensor([[1.0, 0.0, 0.0], [0.5, 1.0, 0.0], [0.2, 0.6, 1.0]])
    y = torch.sign(torch.randn(1000, 3, generator=g) @ mixing.T)
    effects = 0.4 * torch.randn(3, 60, generator=g) * spectrum
    coefficients = y @ effects + spectrum * torch.randn(1000, 60, generator=g)
    population = Population(layout, names(1000), Stacked(coefficients @ basis))
    space = WeightSpace.build(population, gauge="raw", scaling="none", num_components=60)
    labels = Labels.of(space.names, {name: y[:, place].tolist() for place, name in enumerate(ATTRIBUTES)})
    return Planted(space, labels, effects @ basis)


def in_vectors(planted: Planted, found: Directions) -> Tensor:
    """Returns each direction as the unit vector along which the adapters' vectors move."""
    moves = (found.matrix().float() * planted.space.sigma) @ planted.space.components
    return moves / moves.norm(dim=1, keepdim=True)


def test_conditional_directions_are_the_planted_ones(planted: Planted):
    """The normal of the plane that classifies best points elsewhere where attributes are correlated."""
    truth = planted.effects / planted.effects.norm(dim=1, keepdim=True)
    cosines = {}
    for estimator in ("conditional", "mean", "normal", "ridge", "logistic"):
        found = find_directions(planted.space, planted.labels, estimator=estimator)
        cosines[estimator] = (in_vectors(planted, found) * truth).sum(1)
        assert all(row.auc > 0.65 for row in found.rows), [row.auc for row in found.rows]
    assert cosines["conditional"].min() > 0.85
    assert cosines["normal"].max() < 0.5
    assert cosines["conditional"].min() > cosines["mean"].min()
    assert cosines["ridge"].min() > cosines["normal"].max()


def test_keeping_attributes_takes_out_their_span_at_once(planted: Planted):
    """Taking kept attributes out one after the other leaves a rest."""
    found = find_directions(planted.space, planted.labels)
    start = planted.space.point(0.3 * planted.space.members[5])
    moved = edit(start, {"age": 2.0}, found, keep=["beard", "hat"]).point.z - start.z
    own, beard, hat = (float(moved.double() @ found[name].score / found[name].score.norm()) for name in ATTRIBUTES)
    assert abs(beard) < 1e-5 * abs(own)
    assert abs(hat) < 1e-5 * abs(own)
    euclid = edit(start, {"age": 2.0}, found, keep=["beard", "hat"], metric="euclidean").point.z - start.z
    sigma = planted.space.sigma.double()
    for name in ("beard", "hat"):
        kept = found[name].vector * sigma
        assert abs(float((euclid.double() * sigma) @ kept / kept.norm())) < 1e-6
    differences = find_directions(planted.space, planted.labels, estimator="mean")
    age, beard, hat = differences.matrix()
    one = age - (age @ hat) * hat
    one = one - (one @ beard) * beard
    assert abs(float(one @ hat / one.norm())) > 0.05


def test_edits_move_by_the_stated_strength_commute_and_return(planted: Planted):
    """Strength 0 changes nothing, one way and back restores, and the order of edits does not matter."""
    found = find_directions(planted.space, planted.labels)
    start = planted.space.point(planted.space.members[3])
    done = edit(start, {"age": 1.5}, found)
    place = next(place for place in done.places if place.name == "age")
    assert place.after - place.before == pytest.approx(1.5, abs=1e-5)
    assert torch.equal(edit(start, {"age": 0.0}, found).point.z, start.z)
    assert torch.equal(edit(start, {}, found).point.z, start.z)
    back = edit(done.point, {"age": -1.5}, found).point
    torch.testing.assert_close(back.z, start.z, atol=1e-6, rtol=1e-6)
    one = edit(edit(start, {"age": 1.0}, found).point, {"hat": -2.0}, found).point
    other = edit(edit(start, {"hat": -2.0}, found).point, {"age": 1.0}, found).point
    together = edit(start, {"age": 1.0, "hat": -2.0}, found).point
    torch.testing.assert_close(one.z, other.z, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(one.z, together.z, atol=1e-6, rtol=1e-6)
    largest = edit(planted.space.point(), {"age": 1.0}, found, unit="max").point
    assert float(largest.z.double() @ found["age"].axis) == pytest.approx(found["age"].largest, rel=1e-5)
    kept = edit(start, {"age": 1.5}, found, keep=["hat"])
    assert next(p for p in kept.places if p.name == "age").after - place.before == pytest.approx(1.5, abs=1e-4)
    far = edit(start, {"age": 40.0}, found)
    assert any("farther" in note for note in far.warnings)
    assert not edit(planted.space.point(), {"age": 0.5}, found).warnings


@pytest.fixture(scope="module")
def noisy() -> tuple[WeightSpace, Directions]:
    """A space of few members with much noise, whose held-out coordinates are a third as long as the members'."""
    g = torch.Generator().manual_seed(0)
    layout = Layout.of({"to_q": (100, 100)}, rank=1)
    matrix = torch.randn(60, layout.size, generator=g)
    whole = WeightSpace.build(Population(layout, names(60), Stacked(matrix)), gauge="raw", scaling="none")
    space, _ = cross_fitted(whole, num_components=10)
    assert space.shrinkage < 0.5
    return space, find_directions(space, Labels.of(space.names, {"age": space.members[:, 0].tolist()}))


def test_an_edit_is_warned_about_beyond_what_members_reach(noisy: tuple[WeightSpace, Directions]):
    """Places and lengths are compared with the members' own coordinates, not with shorter ones."""
    space, found = noisy
    row = found["age"]
    places = row.place(space.members)
    order = places.argsort().tolist()
    for member in (order[-3], order[len(order) // 2], order[2]):
        point = space.point(space.members[member])
        for strength in (0.0, float(places.max()) - float(places[member]) - 0.05, float(places.min() - places[member])):
            done = edit(point, {"age": strength}, found)
            assert not [note for note in done.warnings if "'age'" in note]
    assert edit(space.point(), {"age": 2.0}, found).warnings == ()
    assert edit(space.point(), {"age": -2.0}, found).warnings == ()
    # The member that is farthest out is where it is.
    far = int(space.members.norm(dim=1).argmax())
    assert edit(space.point(space.members[far]), {"age": 0.0}, found).warnings == ()
    for strength in (8.0, -8.0):
        done = edit(space.point(), {"age": strength}, found)
        assert len(done.warnings) == 2
        assert (
            f"'age' is at {strength:+.1f} standard deviations, farther out than 99.9 % of the members"
            in (done.warnings[0])
        )
        assert f"who lie between {float(places.min()):+.1f} and {float(places.max()):+.1f}" in done.warnings[0]
        assert f"the farthest is at {float(space.members.norm(dim=1).max()):.1f}" in done.warnings[1]
    alone = replace(space, names=(), members=space.members[:0], held_out=space.held_out[:0])
    done = edit(alone.point(), {"age": 8.0}, replace(found, space=alone.fingerprint))
    assert done.warnings == ()
    assert done.places[0].percentile != done.places[0].percentile


def test_what_was_projected_is_compared_with_what_is_as_short(noisy: tuple[WeightSpace, Directions]):
    space, found = noisy
    adapter = space.member("member 7").adapter()
    short, long = space.project(adapter), space.project(adapter, unshrink=True)
    assert (short.projected, long.projected, space.member("member 7").projected) == (True, False, False)
    for point, among in ((short, space.held_out), (long, space.members)):
        place = edit(point, {}, found).places[0]
        assert place.percentile == pytest.approx(100 * float((found["age"].place(among) < place.after).double().mean()))
        one = described(space, point.z[None], projected=point.projected)[0]
        assert one.typical == pytest.approx(100 * float((among.norm(dim=1) < point.length).float().mean()))
    moved = edit(short, {"age": 1.0}, found)
    assert not moved.point.projected
    assert moved.places[0].percentile == pytest.approx(
        100 * float((found["age"].place(space.members) < moved.places[0].after).double().mean())
    )
    # Draws are as far out as members, and not as far as held-out ones.
    assert 20 < float(torch.tensor([one.typical for one in sample(space, 50)]).mean()) < 80


def test_the_published_direction_is_least_squares(planted: Planted):
    """Coefficients are those of scikit-learn, with and without intercept and penalty; raw strengths are theirs."""
    space, labels = planted.space, planted.labels
    beta = (space.members * space.sigma).double()
    y = labels.values
    normal = find_directions(space, labels, estimator="normal")
    ridge = find_directions(space, labels, estimator="ridge", ridge=10.0)
    for place, name in enumerate(ATTRIBUTES):
        theirs = torch.from_numpy(LinearRegression().fit(beta.numpy(), y[:, place].numpy()).coef_)
        row = normal[name]
        ours = row.vector * space.sigma.double()
        torch.testing.assert_close(ours / ours.norm(), theirs / theirs.norm(), atol=1e-6, rtol=1e-5)
        assert row.raw == pytest.approx(float(theirs.norm()), rel=1e-5)
        without = torch.from_numpy(LinearRegression(fit_intercept=False).fit(beta.numpy(), y[:, place].numpy()).coef_)
        torch.testing.assert_close(without, theirs, atol=1e-5 * float(theirs.norm()), rtol=0)
        penalised = torch.from_numpy(Ridge(10.0).fit(beta.numpy(), y[:, place].numpy()).coef_)
        ours = ridge[name].vector * space.sigma.double()
        torch.testing.assert_close(ours / ours.norm(), penalised / penalised.norm(), atol=1e-6, rtol=1e-5)
    moved = edit(space.point(), {"age": 3.0}, normal, unit="raw").point.z.double() * space.sigma
    expected = 3.0 * torch.from_numpy(LinearRegression().fit(beta.numpy(), y[:, 0].numpy()).coef_)
    torch.testing.assert_close(moved, expected, atol=1e-4 * float(expected.norm()), rtol=0)


def test_resampled_members_agree_on_the_side(planted: Planted):
    """A planted direction keeps its sign in more than 95 % of the resamples."""
    found = find_directions(planted.space, planted.labels)
    assert min(bootstrapped(planted.space, planted.labels, found, resamples=40)) > 0.95


def test_leaks_and_deciles(planted: Planted):
    found = find_directions(planted.space, planted.labels)
    assert found.leaks().diagonal().allclose(torch.ones(3).double())
    assert found.leaks().shape == found.cosines().shape == (3, 3)
    assert all(sum(row.deciles()) == pytest.approx(1) for row in found.rows)
    # A direction without what the others share with it leaks less than the plain difference of the means.
    mean = find_directions(planted.space, planted.labels, estimator="mean")
    apart = ~torch.eye(3, dtype=torch.bool)
    assert found.leaks()[apart].abs().max() < mean.leaks()[apart].abs().max()


def test_blanks_are_left_out_and_continuous_labels_are_taken(planted: Planted):
    space, y = planted.space, planted.labels.values
    blank = y.clone()
    blank[:100, 0] = torch.nan
    found = find_directions(space, Labels(ATTRIBUTES, blank))
    assert sum(found["age"].counts) == 900
    years = {
        "years": (
            40 + 10 * space.members[:, 0] + torch.randn(1000, generator=torch.Generator().manual_seed(1))
        ).tolist()
    }
    found = find_directions(space, Labels.of(space.names, years))
    assert found["years"].vector[0] > 0.9
    assert found["years"].auc > 0.9  # the correlation of held-out places


def test_labels_that_say_nothing_are_refused(planted: Planted):
    space, y = planted.space, planted.labels.values
    with pytest.raises(UserError, match="'flat' has the value 1 for all members"):
        find_directions(space, Labels.of(space.names, {"flat": [1.0] * 1000}))
    with pytest.raises(UserError, match="'rare' has 3 members on one side; give at least 5"):
        find_directions(space, Labels.of(space.names, {"rare": [1.0] * 3 + [0.0] * 997}))
    few = find_directions(space, Labels.of(space.names, {"few": [1.0] * 9 + [0.0] * 991}))
    assert "uncertain" in few.notes[0]
    same = {"a": y[:, 0].tolist(), "b": (3 - 2 * y[:, 0]).tolist()}
    with pytest.raises(UserError, match="follow from the other attributes"):
        find_directions(space, Labels.of(space.names, same))
    with pytest.raises(UserError, match="'age' has labels of what is no member: nobody"):
        Labels.of(space.names, {"age": {"nobody": 3.0}})
    with pytest.raises(UserError, match="has 2 values for 1000 members"):
        Labels.of(space.names, {"age": [1.0, 2.0]})
    with pytest.raises(UserError, match="need a space with its members"):
        find_directions(space.without_members(), planted.labels)
    found = find_directions(space, planted.labels)
    with pytest.raises(UserError, match="no direction 'Age'; there are age, beard, hat"):
        edit(space.point(), {"Age": 1.0}, found)
    with pytest.raises(UserError, match="is to be kept and to be moved"):
        edit(space.point(), {"age": 1.0}, found, keep=["age"])
    with pytest.raises(UserError, match="belong to another space"):
        edit(space.truncated(5).point(), {"age": 1.0}, found)


def test_more_attributes_than_members_are_refused(noisy: tuple[WeightSpace, Directions]):
    space, _ = noisy
    values = torch.randn(60, 60, generator=torch.Generator().manual_seed(3))
    with pytest.raises(UserError, match="60 members have all 60 labels; so many attributes need more members"):
        find_directions(space, Labels.of(space.names, {f"a{i}": row.tolist() for i, row in enumerate(values)}))


def test_what_is_one_with_a_kept_attribute_cannot_be_moved(planted: Planted):
    y = planted.labels.values[:, :1] + 0.01 * torch.randn(1000, 2, generator=torch.Generator().manual_seed(2)).double()
    labels = Labels(("one", "other"), y)
    found = find_directions(planted.space, labels, estimator="mean")
    with pytest.raises(UserError, match="is shared with 'other'"):
        edit(planted.space.point(), {"one": 1.0}, found, keep=["other"])


def test_samples_have_the_moments_of_the_members(planted: Planted):
    """Mean and covariance of 20 000 draws are those of the members, up to a few standard errors."""
    z = torch.stack([one.point.z for one in sample(planted.space, 20_000)])
    error = 3 / 20_000**0.5
    assert z.mean(0).abs().max() < 1.5 * error
    assert (z.T @ z / 20_000 - torch.eye(60)).abs().max() < 2.5 * error
    assert torch.stack([one.point.z for one in sample(planted.space, 3, truncation=0.0)]).abs().max() == 0
    for method in ("mixture", "bootstrap", "slerp"):
        z = torch.stack([one.point.z for one in sample(planted.space, 2000, method=method)])
        assert z.mean(0).abs().max() < 0.2
        assert 0.6 < float(z.std()) < 1.2


def test_a_member_is_a_near_copy_and_a_draw_is_none(planted: Planted):
    """The check for near copies fires on a member, and on at most 2 of 50 draws."""
    draws = sample(planted.space, 50, seed=3)
    assert sum(one.near_copy for one in draws) <= 2
    (again,) = described(planted.space, planted.space.members[7:8] + 1e-3)
    assert again.near_copy
    assert again.nearest == planted.space.names[7]
    assert again.cosine > 0.999
    bare = sample(planted.space.without_members(), 2)
    assert bare[0].nearest == ""
    with pytest.raises(UserError, match="which 'slerp' draws from"):
        sample(planted.space.without_members(), 2, method="slerp")


def test_conditions_put_draws_where_they_are_asked_to_be(planted: Planted):
    found = find_directions(planted.space, planted.labels)
    draws = sample(planted.space, 40, condition={"age": 2.0, "hat": -1.0}, directions=found)
    z = torch.stack([one.point.z for one in draws])
    assert found["age"].place(z).allclose(torch.tensor(2.0).double(), atol=1e-4)
    assert found["hat"].place(z).allclose(torch.tensor(-1.0).double(), atol=1e-4)
    assert float(z.std()) > 0.8
    with pytest.raises(UserError, match="needs `directions`"):
        sample(planted.space, 1, condition={"age": 2.0})


def test_an_arc_begins_and_ends_at_its_points():
    g = torch.Generator().manual_seed(0)
    one, other = torch.randn(5, 8, generator=g), 2 * torch.randn(5, 8, generator=g)
    torch.testing.assert_close(slerp(one, other, torch.zeros(5, 1)), one, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(slerp(one, other, torch.ones(5, 1)), other, atol=1e-5, rtol=1e-5)
    middle = slerp(one, other, torch.full((5, 1), 0.5))
    torch.testing.assert_close(middle.norm(dim=1), (one.norm(dim=1) + other.norm(dim=1)) / 2, atol=1e-4, rtol=1e-4)
