"""The population of digit styles: what comes with the package, and how it was made."""

from dataclasses import replace

import pytest
import torch
from sklearn.linear_model import LinearRegression
from torch import Tensor

from diffcore.models import DiffusionModel
from diffcore.zoo.digits.data import STYLES
from w2w_space.gauge import GaugeKind
from w2w_space.instance import Instance
from w2w_space.invert import InversionSettings, invert
from w2w_space.recipe import layout_for
from w2w_space.space import WeightSpace
from w2w_space.styles import (
    RECIPE,
    load_base,
    load_styles,
    read_styles,
    render_members,
    style_instances,
    style_labels,
    train_styles,
)


@pytest.fixture(scope="module")
def base() -> DiffusionModel:
    return load_base()


def held_out_r2(*, own: bool, gauge: GaugeKind) -> Tensor:
    """R^2 of the five style numbers of 32 members, from 20 coefficients of a space of the other 128."""
    population, labels = load_styles(own=own)
    order = torch.randperm(160, generator=torch.Generator().manual_seed(0))
    fit, held = order[:128].tolist(), order[128:].tolist()
    space = WeightSpace.build(population.subset(fit), gauge=gauge, num_components=20)
    line = LinearRegression().fit(space.members.numpy(), labels[fit].numpy())
    predicted = torch.from_numpy(line.predict(space.coordinates(population.vectors.rows(held)).numpy()))
    true = labels[held]
    return 1 - (predicted - true).square().sum(0) / (true - true.mean(0)).square().sum(0)


def test_weights_carry_the_style_and_the_gauge_makes_it_readable():
    assert float(held_out_r2(own=False, gauge="canonical").min()) > 0.8
    assert float(held_out_r2(own=False, gauge="raw").min()) > 0.8
    assert float(held_out_r2(own=True, gauge="canonical").min()) > 0.5
    assert float(held_out_r2(own=True, gauge="raw").max()) < 0.1


@pytest.mark.slow
def test_one_picture_gives_the_style_back(base: DiffusionModel):
    """Sixteen members that the space has not seen, one new picture each."""
    population, labels = load_styles()
    order = torch.randperm(160, generator=torch.Generator().manual_seed(0))
    fit, held = order[:128].tolist(), order[128:144].tolist()
    space = WeightSpace.build(population.subset(fit))
    pictures = style_instances(labels, seed=5)
    subjects = [
        Instance(pictures[i].name, pictures[i].x0[c : c + 1], {"class_labels": torch.tensor([c])})
        for c, i in ((place % 10, i) for place, i in enumerate(held))
    ]
    found = invert(space, base, subjects, InversionSettings(num_components=50, steps=100, batch_size=8))
    vectors = torch.stack([point.vector for point in found.points])
    read = read_styles(render_members(base, population.layout, vectors, per_class=8))
    assert float((read - labels[held]).square().mean().sqrt()) <= 0.4
    for k, name in enumerate(STYLES):
        assert float(torch.corrcoef(torch.stack([read[:, k], labels[held][:, k]]))[0, 1]) > 0.7, name
    assert all(point.length <= 1.2 * 50**0.5 + 1e-4 for point in found.points)


def test_styles_are_balanced_and_stored_with_their_members(base: DiffusionModel):
    population, labels = load_styles()
    others, same = load_styles(own=True)
    assert torch.equal(labels, same)
    assert torch.equal(labels, style_labels())
    assert population.layout == others.layout == layout_for(base, RECIPE.targets, RECIPE.rank)
    assert len(population.layout.modules) == 28
    assert labels.sort(0).values.eq((2 * torch.arange(160) + 1)[:, None] / 160 - 1).all()
    assert (torch.corrcoef(labels.T) - torch.eye(5)).abs().max() < 0.25
    assert population.names == tuple(each.name for each in style_instances(labels))


def test_members_draw_digits_in_their_style(base: DiffusionModel):
    population, labels = load_styles()
    some = labels.sum(1).sort().indices[torch.linspace(0, 159, 16).long()].tolist()
    read = read_styles(render_members(base, population.layout, population.vectors.rows(some)))
    true = labels[some]
    for k, name in enumerate(STYLES):
        correlation = float(torch.corrcoef(torch.stack([read[:, k], true[:, k]]))[0, 1])
        assert correlation > 0.8, name


def test_training_starts_where_the_stored_members_did(base: DiffusionModel, monkeypatch: pytest.MonkeyPatch):
    """Three steps of two members: the shared A is that of the stored ones, and each learns."""
    monkeypatch.setattr("w2w_space.styles.RECIPE", replace(RECIPE, steps=3))
    members, styles = train_styles(base, count=2)
    own, _ = train_styles(base, count=2, own=True)
    assert styles.shape == (2, 5)
    assert all(member.gain > 0 for member in members)
    population, _ = load_styles()
    shared = members[0].vector - members[1].vector
    apart = own[0].vector - own[1].vector
    assert float(apart.norm()) > 5 * float(shared.norm())
    stored = population.vectors.rows([0])[0]
    assert float(torch.nn.functional.cosine_similarity(members[0].vector, stored, dim=0)) > 0.45
    assert float(torch.nn.functional.cosine_similarity(own[0].vector, stored, dim=0)) < 0.15


def test_instances_are_ten_digits_of_one_style():
    styles = style_labels(3)
    one, other = style_instances(styles)[1], style_instances(styles, seed=1)[1]
    assert one.condition["class_labels"].tolist() == list(range(10))
    assert not torch.equal(one.x0, other.x0)
    ink, background = styles[1, 0], styles[1, 1]
    assert float(one.x0.min()) == pytest.approx(float(-0.6 + 0.4 * background), abs=1e-5)
    assert float(one.x0.max()) <= float(0.65 + 0.35 * ink) + 1e-5
