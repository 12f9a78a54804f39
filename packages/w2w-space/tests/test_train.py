"""Many adapters in one forward pass, and the training of a population."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffcore.adapters.fusing import apply
from diffcore.errors import IncompatibleModelError, NoMatchError, UserError
from diffcore.models import DiffusionModel, from_pipeline
from diffcore.run import Run, RunMap
from diffcore.testing import tiny
from diffcore.train.timesteps import default_time_sampler, uniform_timesteps
from w2w_space.bank import bank
from w2w_space.instance import Deck, Instance, denoising_errors
from w2w_space.invert import InversionSettings, invert
from w2w_space.layout import Layout
from w2w_space.pictures import condition_of
from w2w_space.population import Population, Stacked
from w2w_space.recipe import Recipe, initial_vectors, layout_for
from w2w_space.space import WeightSpace
from w2w_space.train_population import Trained, population_of, train_population


def double(name: str) -> DiffusionModel:
    model = tiny.model(name)
    model.backbone.double().requires_grad_(False)
    return model


def instances(model: DiffusionModel, count: int, pictures: int = 3, scale: float = 1.0) -> list[Instance]:
    generator = torch.Generator().manual_seed(1)
    return [
        Instance(
            f"person {i}",
            scale * torch.randn(pictures + i % 2, *model.shape, generator=generator),
            {"encoder_hidden_states": torch.randn(1, 7, 32, generator=generator)},
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("rank", [1, 3])
def test_a_bank_equals_its_adapters_one_by_one(rank: int):
    model = double("sd15")
    layout = layout_for(model, ("to_q", "to_v", "to_out.0"), rank)
    generator = torch.Generator().manual_seed(0)
    vectors = 0.3 * torch.randn(3, layout.size, generator=generator, dtype=torch.float64)
    x_t, t, cond = tiny.inputs("sd15", batch=6)
    x_t, cond = x_t.double(), {key: value.double() for key, value in cond.items()}

    def outputs(rows: slice) -> Tensor:
        return model.denoiser(x_t[rows], t[rows].double(), {k: v[rows] for k, v in cond.items()}).output

    together = vectors.clone().requires_grad_()
    with bank(model.backbone, layout, together):
        all_rows = outputs(slice(None))
        (gradient,) = torch.autograd.grad(all_rows.square().flatten(1).mean(1).sum(), together)
    for i in range(3):
        rows = slice(2 * i, 2 * i + 2)
        with apply(model.backbone, layout.adapter(vectors[i]).modules):
            assert (outputs(rows) - all_rows[rows]).abs().max() < 1e-12
        alone = vectors[i : i + 1].clone().requires_grad_()
        with bank(model.backbone, layout, alone):
            (own,) = torch.autograd.grad(outputs(rows).square().flatten(1).mean(1).sum(), alone)
        assert (own[0] - gradient[i]).abs().max() < 1e-12
        assert own.abs().max() > 1e-4
    assert (outputs(slice(None)) - all_rows).abs().max() > 1e-3  # the hooks are gone


def test_a_bank_refuses_what_it_would_leave_unchanged():
    model = tiny.model("sd15")
    layout = layout_for(model, ("to_q",), 1)
    cases: list[tuple[str, tuple[int, ...], str]] = [
        ("conv_in", (32, 4, 3, 3), "'conv_in' is a convolution"),
        ("to_nothing", (4, 4), "no such module"),
        (layout.modules[0], (4, 4), "has shape"),
    ]
    for module, shape, message in cases:
        with pytest.raises(IncompatibleModelError, match=message):
            enter(model.backbone, Layout.of({module: shape}, 1))
    x_t, t, cond = tiny.inputs("sd15", batch=3)
    two = torch.zeros(2, layout.size)
    with bank(model.backbone, layout, two), pytest.raises(ValueError, match="3 rows, which 2 adapters"):
        model.denoiser(x_t, t, cond)
    network: Any = model.backbone
    network.fuse_qkv_projections()
    with pytest.raises(IncompatibleModelError, match="fused"):
        enter(model.backbone, layout)
    compiled: Any = torch.compile(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(IncompatibleModelError, match="compiled"):
        enter(compiled, Layout.of({"0": (2, 2)}, 1))


def enter(network: Any, layout: Layout) -> None:
    with bank(network, layout, torch.zeros(2, layout.size)):
        pass


RECIPE = Recipe(
    targets=("to_q", "to_v"),
    alpha=2.0,
    learning_rate=1e-2,
    steps=4,
    batch_size=3,
    warmup=2,
    floor=0.1,
    clip=1e-3,
)


def test_training_together_equals_training_alone():
    model = double("sd15")
    people = instances(model, 3)
    rates = [1.0, 0.5, 1.0]
    together = train_population(model, people, RECIPE, rates=rates, num_pairs=4)
    alone = train_population(model, people, RECIPE, rates=rates, num_pairs=4, group_size=1)
    swapped = train_population(model, people[::-1], RECIPE, rates=rates[::-1], num_pairs=4, group_size=2)[::-1]
    for one, other, third in zip(together, alone, swapped, strict=True):
        assert one.vector.dtype == torch.float64
        assert (one.vector - other.vector).abs().max() < 1e-10
        assert (one.vector - third.vector).abs().max() < 1e-10
        assert abs(one.loss - other.loss) < 1e-10
        assert (one.history - other.history).abs().max() < 1e-10
    assert (together[0].vector - together[1].vector).abs().max() > 1e-3


def test_a_member_has_its_own_factor_of_the_learning_rate():
    model = double("sd15")
    people, recipe = instances(model, 2), replace(RECIPE, steps=1)
    full = train_population(model, people, recipe, num_pairs=2)
    half = train_population(model, people, recipe, num_pairs=2, rates=[1.0, 0.5])
    start = initial_vectors(layout_for(model, recipe.targets, 1), recipe, ["a"])[0].double()
    assert torch.equal(full[0].vector, half[0].vector)
    assert torch.allclose(half[1].vector - start, 0.5 * (full[1].vector - start), atol=1e-12)
    assert (full[1].vector - start).abs().max() > 1e-3


def test_training_is_adam_on_each_member_alone():
    """A plain loop over one member with its two factors, as PEFT would train it."""
    model = double("sd15")
    (person,) = instances(model, 1)
    recipe = replace(RECIPE, clip=0.05)
    (member,) = train_population(model, [person], recipe, num_pairs=2)
    layout = layout_for(model, recipe.targets, 1)
    start = initial_vectors(layout, recipe, [person.name])[0].double()
    factors = {
        n: (a.clone().requires_grad_(), b.clone().requires_grad_()) for n, (a, b) in layout.factors(start).items()
    }
    parameters = [x for pair in factors.values() for x in pair]
    optimizer = torch.optim.AdamW(parameters, recipe.learning_rate, weight_decay=recipe.weight_decay)
    deck = Deck([person], uniform_timesteps(1000), seed=0, antithetic=False, like=torch.empty((), dtype=torch.float64))
    for step in range(recipe.steps):
        batch = deck.deal(3, step)
        hooks = []
        for name, (a, b) in factors.items():
            module = model.backbone.get_submodule(name)
            hooks.append(module.register_forward_hook(lambda m, x, y, a=a, b=b: y + 2.0 * x[0] @ a.T @ b.T))
        x_t = model.denoiser.schedule.add_noise(batch.x0, batch.noise, batch.t)
        loss = (model.denoiser(x_t, batch.t, batch.condition).output - batch.noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        for hook in hooks:
            hook.remove()
        torch.nn.utils.clip_grad_norm_(parameters, 0.05)
        rise = min(1.0, (step + 1) / 2)
        cosine = 0.5 * (1 + torch.tensor(torch.pi * step / 4, dtype=torch.float64).cos())
        optimizer.param_groups[0]["lr"] = float(rise * (0.1 + 0.9 * cosine)) * recipe.learning_rate
        optimizer.step()
        assert abs(float(loss.detach()) - float(member.history[step])) < 1e-10
    expected = torch.cat([torch.cat([a.flatten(), 2 * b.flatten()]) for a, b in factors.values()])
    # PyTorch adds 1e-6 to the norm by which it clips.
    assert (member.vector - expected.detach()).abs().max() < 1e-6


def test_training_beats_the_base_model():
    model = tiny.model("unet2d")
    generator = torch.Generator().manual_seed(0)
    people = [
        Instance(str(i), 0.5 * torch.randn(1, *model.shape, generator=generator), {"class_labels": torch.tensor([i])})
        for i in range(2)
    ]
    recipe = Recipe(targets=("to_q", "to_v", "to_out.0"), alpha=4.0, learning_rate=3e-2, steps=40, batch_size=8)
    members = train_population(model, people, recipe)
    assert all(member.gain > 0.05 for member in members)
    assert all(len(member.history) == 40 for member in members)
    population = population_of(layout_for(model, recipe.targets, 1), members)
    assert population.names == ("0", "1")


@pytest.mark.parametrize(("name", "kind"), [("sd21", "v"), ("sdxl", "epsilon"), ("sd3", "flow")])
def test_models_of_every_kind_are_trained_and_searched(name: str, kind: str):
    """Other targets than the noise, conditions besides the prompt, and several text encoders."""
    model = from_pipeline(tiny.pipeline(name))
    condition = condition_of(model, prompt="a sks toy")
    assert (name == "sdxl") == ("time_ids" in condition)
    generator = torch.Generator().manual_seed(0)
    people = [Instance(str(i), torch.randn(1, *model.shape, generator=generator), condition) for i in range(2)]
    schedule = model.denoiser.schedule
    deck = Deck(people, default_time_sampler(schedule), seed=0, antithetic=False, like=torch.empty(()))
    batch = deck.deal(3, 0)
    alpha, sigma = (part.view(-1, 1, 1, 1) for part in schedule.alpha_sigma(batch.t))
    target = {
        "v": alpha * batch.noise - sigma * batch.x0,
        "epsilon": batch.noise,
        "flow": batch.noise - batch.x0,
    }[kind]
    output = model.denoiser(alpha * batch.x0 + sigma * batch.noise, batch.t, batch.condition).output
    expected = (output - target).square().flatten(1).mean(1)
    torch.testing.assert_close(denoising_errors(model.denoiser, batch), expected, atol=1e-5, rtol=1e-5)
    recipe = Recipe(alpha=4.0, learning_rate=3e-2, steps=12, batch_size=4, warmup=1, weight_decay=0.0)
    members = train_population(model, people, recipe, num_pairs=8)
    assert all(member.gain > 0.005 for member in members), [member.gain for member in members]
    layout = layout_for(model, recipe.targets, 1)
    trained = torch.stack([member.vector.float() for member in members])
    rows = torch.cat([trained, 0.1 * torch.randn(4, layout.size, generator=generator)])
    space = WeightSpace.build(Population(layout, tuple("abcdef"), Stacked(rows)))
    found = invert(space, model, people, InversionSettings(steps=10, batch_size=4, check_every=5, learning_rate=0.3))
    assert bool((found.losses < found.start_losses).all())


def test_the_initial_a_is_shared_unless_asked():
    layout = Layout.of({"m": (3, 4), "n": (2, 9)}, rank=2)
    shared = initial_vectors(layout, Recipe(rank=2), ["a", "b"])
    own = initial_vectors(layout, Recipe(rank=2, init="own"), ["a", "b"])
    assert torch.equal(shared[0], shared[1])
    assert not torch.equal(own[0], own[1])
    for vectors in (shared, own):
        for a, b in layout.factors(vectors).values():
            assert not b.any()
            assert 0.5 < float(a.abs().max()) * a.shape[-1] ** 0.5 <= 1
    assert torch.equal(own[1], initial_vectors(layout, Recipe(rank=2, init="own"), ["b"])[0])


def test_a_failed_member_is_tried_again_and_then_recorded():
    model = tiny.model("sd15")
    people = instances(model, 4)
    broken = replace(people[1], x0=torch.full_like(people[1].x0, torch.nan))
    recipe = replace(RECIPE, steps=2)
    members = train_population(model, [people[0], broken, *people[2:]], recipe, num_pairs=2)
    plain = train_population(model, people, recipe, num_pairs=2)
    assert [member.failed for member in members] == [False, True, False, False]
    assert members[1].rate == 0.5
    assert torch.equal(members[0].vector, plain[0].vector)  # its neighbour in the batch does not harm it
    population = population_of(layout_for(model, recipe.targets, 1), members)
    assert population.names == ("person 0", "person 2", "person 3")


def test_a_member_that_diverges_is_saved_by_half_the_rate():
    """A run that reports a huge loss at the full rate, and a usual one at half of it."""
    model = tiny.model("sd15")
    seen: list[float] = []

    def unstable(work: Any, items: Any, *, name: str, kind: Any, unit_size: int = 1) -> Any:
        rows = work(list(items))
        size = layout_for(model, RECIPE.targets, 1).size
        for item, row in zip(items, rows, strict=True):
            seen.append(item[2])
            if item[0] == "person 2" and item[2] == 1.0:
                row[size] = 100.0
        return rows

    members = train_population(model, instances(model, 4), replace(RECIPE, steps=2), num_pairs=2, map=unstable)
    assert seen == [1.0, 1.0, 1.0, 1.0, 0.5]
    assert [member.rate for member in members] == [1.0, 1.0, 0.5, 1.0]
    assert not any(member.failed for member in members)


def test_masks_weigh_places_and_prompts_are_shared():
    model = double("sd15")
    (person,) = instances(model, 1)
    like = torch.empty((), dtype=torch.float64)
    mask = torch.zeros(len(person), 1, 8, 8)
    mask[..., :4] = 0.5
    sampler = uniform_timesteps(1000)
    plain = Deck([person], sampler, seed=0, antithetic=True, like=like).deal(4, 0)
    masked = Deck([replace(person, mask=mask)], sampler, seed=0, antithetic=True, like=like).deal(4, 0)
    x_t = model.denoiser.schedule.add_noise(plain.x0, plain.noise, plain.t)
    squared = (model.denoiser(x_t, plain.t, plain.condition).output - plain.noise).square()
    assert torch.allclose(denoising_errors(model.denoiser, plain), squared.flatten(1).mean(1))
    assert torch.allclose(denoising_errors(model.denoiser, masked), squared[..., :4].flatten(1).mean(1))
    assert torch.equal(plain.noise[0], -plain.noise[1])
    assert (plain.t // 250).tolist() == [0, 1, 2, 3]


def test_each_picture_comes_once_before_one_comes_again():
    model = tiny.model("sd15")
    people = instances(model, 2, pictures=3)
    deck = Deck(people, uniform_timesteps(1000), seed=0, antithetic=False, like=torch.empty(()))
    batch = deck.deal(8, 5)
    for rows, person in ((batch.x0[:8], people[0]), (batch.x0[8:], people[1])):
        which = [next(i for i, x in enumerate(person.x0) if torch.equal(x, row)) for row in rows]
        k = len(person)
        assert sorted(which[:k]) == list(range(k))
        assert sorted(which[k : 2 * k])[:2] == sorted(set(which[k : 2 * k]))[:2]
    assert not torch.equal(deck.deal(8, 6).x0, batch.x0)


def test_bad_instances_and_targets_are_refused():
    model = tiny.model("sd15")
    one, two = instances(model, 2)
    with pytest.raises(UserError, match="two instances are called 'person 0'"):
        train_population(model, [one, one], RECIPE)
    with pytest.raises(UserError, match="no instances"):
        train_population(model, [], RECIPE)
    with pytest.raises(UserError, match="other conditions"):
        train_population(model, [one, replace(two, condition={})], RECIPE)
    with pytest.raises(NoMatchError, match="'to_x'"):
        train_population(model, [one], replace(RECIPE, targets=("to_x",)))
    with pytest.raises(IncompatibleModelError, match="'conv_in'"):
        layout_for(model, ("conv_in",), 1)
    with pytest.raises(ValueError, match="no pictures"):
        replace(one, x0=one.x0[:0])
    with pytest.raises(ValueError, match="has 2 rows"):
        replace(one, condition={"encoder_hidden_states": torch.zeros(2, 7, 32)})
    with pytest.raises(ValueError, match="divide bytes by 255"):
        replace(one, mask=torch.full((len(one), 1, 8, 8), 255.0))
    with pytest.raises(ValueError, match="is empty"):
        replace(one, mask=torch.zeros(len(one), 1, 8, 8))
    with pytest.raises(ValueError, match="`floor`"):
        Recipe(floor=2.0)
    failed = Trained("a", torch.zeros(3), 1.0, 1.0, torch.zeros(1), failed=True)
    with pytest.raises(UserError, match="all members failed"):
        population_of(layout_for(model, ("to_q",), 1), [failed])


def test_pictures_of_the_class_are_trained_beside_the_subjects():
    model = double("sd15")
    people = instances(model, 2)
    (klass,) = instances(model, 1, pictures=6)
    klass = replace(klass, name="person", x0=2 * klass.x0)
    plain = train_population(model, people, RECIPE, num_pairs=2)
    nothing = train_population(model, people, RECIPE, num_pairs=2, prior=klass, prior_weight=0.0)
    kept = train_population(model, people, RECIPE, num_pairs=2, prior=klass)
    alone = train_population(model, people, RECIPE, num_pairs=2, prior=klass, group_size=1)
    for i in range(2):
        assert (plain[i].vector - nothing[i].vector).abs().max() < 1e-10
        assert (kept[i].vector - alone[i].vector).abs().max() < 1e-10
        assert (plain[i].vector - kept[i].vector).abs().max() > 1e-3
        assert abs(float(plain[i].history[0] - kept[i].history[0])) < 1e-10
    layout = layout_for(model, RECIPE.targets, 1)
    like = torch.empty((), dtype=torch.float64)
    decks = [
        Deck(each, uniform_timesteps(1000), seed=0, antithetic=False, like=like)
        for each in (people, [replace(klass, name=f"class for {person.name}") for person in people])
    ]
    vectors = initial_vectors(layout, RECIPE, ["a", "b"]).double().requires_grad_()
    total: Any = 0
    for deck in decks:
        with bank(model.backbone, layout, vectors):
            total = total + denoising_errors(model.denoiser, deck.deal(3, 0)).view(2, 3).mean(1).sum()
    (expected,) = torch.autograd.grad(total, vectors)
    both = decks[0].deal(3, 0).beside(decks[1].deal(3, 0), 2)
    with bank(model.backbone, layout, vectors):
        errors = denoising_errors(model.denoiser, both).view(2, 2, 3)
        (found,) = torch.autograd.grad(errors.mean(2).sum(), vectors)
    assert (found - expected).abs().max() < 1e-12
    with pytest.raises(UserError, match="other conditions"):
        train_population(model, people, RECIPE, prior=replace(klass, condition={}))


def test_training_that_was_interrupted_equals_one_that_was_not(tmp_path: Path):
    model = tiny.model("dit")
    generator = torch.Generator().manual_seed(0)
    people = [
        Instance(str(i), torch.randn(2, *model.shape, generator=generator), {"class_labels": torch.tensor([i])})
        for i in range(5)
    ]
    whole = train_population(model, people, RECIPE, group_size=2, num_pairs=2)
    units = 0

    class Interrupted(RunMap):
        def _keep(self, key: str, results: list[Any], kind: type[Any]) -> None:
            nonlocal units
            if units == 2:
                raise KeyboardInterrupt
            units += 1
            super()._keep(key, results, kind)

    with pytest.raises(KeyboardInterrupt), Run.open(tmp_path / "run", command="w2w train", config={}) as run:
        train_population(model, people, RECIPE, group_size=2, num_pairs=2, map=Interrupted(run))
    with Run.open(tmp_path / "run", command="w2w train", config={}) as run:
        assert len(list((tmp_path / "run").rglob("train-*.safetensors"))) == 2
        again = train_population(model, people, RECIPE, group_size=2, num_pairs=2, map=RunMap(run))
    for one, other in zip(whole, again, strict=True):
        assert torch.equal(one.vector, other.vector)
        assert torch.equal(one.history, other.history)


def test_a_gain_is_told_from_noise():
    """The noise is the standard error of the differences on the same pairs."""
    model = double("sd15")
    (person,) = instances(model, 1)
    (member,) = train_population(model, [person], RECIPE, num_pairs=6)
    like = torch.empty((), dtype=torch.float64)
    deck = Deck([person], uniform_timesteps(1000), seed=0, antithetic=False, like=like)
    batch = deck.deal(6, 0, evaluation=True)
    layout = layout_for(model, RECIPE.targets, 1)
    with torch.no_grad():
        base = denoising_errors(model.denoiser, batch)
        with bank(model.backbone, layout, member.vector[None]):
            own = denoising_errors(model.denoiser, batch)
    assert member.loss == pytest.approx(float(own.mean()))
    assert member.base_loss == pytest.approx(float(base.mean()))
    assert member.noise == pytest.approx(float((base - own).std() / 6**0.5))
    assert replace(member, loss=0.9, base_loss=1.0, noise=0.04).beats_base
    assert not replace(member, loss=0.9, base_loss=1.0, noise=0.06).beats_base
