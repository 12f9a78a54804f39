"""Training the members of a population, many at a time in one forward pass.

Each member i minimises its own denoising loss over its pictures with the same recipe and, unless asked otherwise, from
the same initial A. A group of members minimises

    sum_i mean over rows of i of (o - target)^2 + prior weight * mean over rows of the class,

whose gradient holds each member's own, however many there are. Clipping, random draws and learning rate belong to each
member alone, and Adam works number by number: a member comes out the same in whatever group it is trained.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from diffcore.digests import digest_of_values
from diffcore.errors import UserError
from diffcore.models import DiffusionModel
from diffcore.train import rise_and_fall
from diffcore.train.timesteps import default_time_sampler
from diffcore.units import Map, each_unit
from w2w_space.bank import bank
from w2w_space.instance import Deck, Instance, denoising_errors, held_out_errors, instances_by_name
from w2w_space.layout import Layout
from w2w_space.population import Population, Stacked
from w2w_space.recipe import Recipe, initial_vectors, layout_for, up_numbers

DIVERGED = 3.0
"""A member whose loss exceeds the population's median by this factor has failed."""
_RETRY = 0.5


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained member.

    Attributes:
        name: Name of the instance that it was trained on.
        vector: The adapter's vector, with the scale of the change in B.
        loss: Denoising loss after training, on pairs of timestep and noise that training did not see.
        base_loss: Loss of the base model on the same pairs.
        history: Training loss on the subject's pictures in each step, before the step.
        rate: Factor of the recipe's learning rate; half after a failure.
        failed: Whether training failed twice: the loss is not finite, or more than 3 times the population's median.
        noise: Standard error of the difference of the two losses, from the pairs that they were measured on.
    """

    name: str
    vector: Float[Tensor, " size"]
    loss: float
    base_loss: float
    history: Float[Tensor, " steps"]
    rate: float = 1.0
    failed: bool = False
    noise: float = 0.0

    @property
    def gain(self) -> float:
        """Share of the base model's loss that the adapter removes."""
        return 1 - self.loss / self.base_loss

    @property
    def beats_base(self) -> bool:
        """Whether the loss is below the base model's by more than two standard errors; other members are suspect."""
        return self.base_loss - self.loss > 2 * self.noise


def train_population(
    model: DiffusionModel,
    instances: Sequence[Instance],
    recipe: Recipe,
    *,
    layout: Layout | None = None,
    prior: Instance | None = None,
    prior_weight: float = 1.0,
    rates: Sequence[float] | None = None,
    group_size: int = 16,
    num_pairs: int = 32,
    map: Map = each_unit,
) -> list[Trained]:
    """Trains one adapter for each instance and returns them in order, failed ones among them.

    A member that fails, because its loss is not finite or exceeds three times the median, is trained once more at half
    the learning rate, and recorded as failed if that does not help.

    Args:
        model: Base model, whose weights stay as they are.
        instances: Subjects with their pictures, each of another name.
        recipe: Recipe of all members.
        layout: Table of the vectors; by default that of the recipe's targets in sorted order.
        prior: Pictures of the class with their condition, which each step sees beside as many of the subject, so that
            members keep drawing the class (prior preservation); the paper takes 200 that the base model drew.
        prior_weight: Weight of the loss on the pictures of the class.
        rates: Factor of the learning rate for each member; by default 1 for all.
        group_size: Number of members that are trained together; it bounds the memory and changes no result.
        num_pairs: Number of pairs of timestep and noise on which each member's loss is measured in the end.
        map: Map over members that may keep what is finished.

    Raises:
        UserError: Two instances have one name, or their conditions differ in kind.
        NoMatchError: The model has no module of the recipe's targets.
        IncompatibleModelError: The model is compiled or fused, or a target is no linear module.

    Example:
        >>> from diffcore.testing import tiny
        >>> model = tiny.model("unet2d")
        >>> pictures = torch.randn(4, *model.shape, generator=torch.Generator().manual_seed(0))
        >>> labels = {"class_labels": torch.arange(4)}
        >>> people = [Instance(name, pictures, labels) for name in ("a", "b")]
        >>> recipe = Recipe(steps=2, batch_size=2)
        >>> [member.name for member in train_population(model, people, recipe)]
        ['a', 'b']
    """
    by_name = instances_by_name(instances)
    factors = dict(zip(by_name, [1.0] * len(by_name) if rates is None else rates, strict=True))
    layout = layout or layout_for(model, recipe.targets, recipe.rank)
    if prior is not None:
        instances_by_name([instances[0], replace(prior, name=f"{instances[0].name} and its class")])
    kept = [recipe.to_json(), layout.to_json(), model.fingerprint, num_pairs, prior and prior.digest, prior_weight]
    word = digest_of_values(kept)[:16]

    def work(unit: list[tuple[str, str, float]]) -> list[Tensor]:
        rows = torch.tensor([rate for _, _, rate in unit], dtype=torch.float64)
        chosen = [by_name[name] for name, _, _ in unit]
        return _train(model, layout, recipe, chosen, rows, num_pairs, prior, prior_weight)

    def trained(names: Sequence[str], stage: str) -> list[Trained]:
        items = [(name, by_name[name].digest, factors[name]) for name in names]
        done = map(work, items, name=f"{stage}-{word}", kind=Tensor, unit_size=group_size)
        return [_unpacked(item, row.cpu(), layout) for item, row in zip(items, done, strict=True)]

    members = trained(list(by_name), "train")
    limit = DIVERGED * float(torch.tensor([member.loss for member in members], dtype=torch.float64).nanmedian())
    again = [member.name for member in members if not member.loss <= limit]
    if not again:
        return members
    factors |= {name: _RETRY * factors[name] for name in again}
    second = {member.name: replace(member, failed=not member.loss <= limit) for member in trained(again, "retry")}
    return [second.get(member.name, member) for member in members]


def population_of(layout: Layout, members: Sequence[Trained]) -> Population:
    """Returns the population of the members whose training did not fail.

    Args:
        layout: Table of the vectors, as `layout_for` returns it for the recipe.
        members: Trained members of one recipe.

    Raises:
        UserError: All members failed.
    """
    kept = [member for member in members if not member.failed]
    if not kept:
        raise UserError("the training of all members failed; lower the learning rate of the recipe")
    matrix = torch.stack([member.vector.float() for member in kept])
    return Population(layout, tuple(member.name for member in kept), Stacked(matrix))


def descend(
    vectors: Float[Tensor, "n size"],
    gradient: Float[Tensor, "n size"],
    optimizer: torch.optim.Optimizer,
    *,
    clip: float | None,
    rates: Float[Tensor, "n 1"],
) -> None:
    """Takes one step in place, with each row's gradient clipped by its own norm and its own factor of the step.

    Args:
        vectors: Parameters of the optimizer, one row per member.
        gradient: Gradient of the sum of the members' losses.
        optimizer: Optimizer that works number by number, such as Adam.
        clip: Largest norm of a row of the gradient; None clips nothing.
        rates: Factor of each row's step.
    """
    if clip is not None:
        gradient = gradient * (clip / gradient.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1.0)
    before = vectors.detach().clone()
    vectors.grad = gradient
    optimizer.step()
    with torch.no_grad():
        vectors.copy_(before.lerp(vectors, rates))


def _train(
    model: DiffusionModel,
    layout: Layout,
    recipe: Recipe,
    instances: list[Instance],
    rates: Tensor,
    num_pairs: int,
    prior: Instance | None,
    prior_weight: float,
) -> list[Tensor]:
    """Trains one group and returns a row for each member: vector, both losses, their noise, loss of each step."""
    denoiser, n = model.denoiser, len(instances)
    dtype = torch.promote_types(model.dtype, torch.float32)
    like = torch.empty((), device=model.device, dtype=dtype)
    scales = torch.where(up_numbers(layout), recipe.scale, 1.0).to(like)
    sampler = default_time_sampler(denoiser.schedule)
    deck = Deck(instances, sampler, seed=recipe.seed, antithetic=False, like=like)
    of_class = [] if prior is None else [replace(prior, name=f"class for {each.name}") for each in instances]
    class_deck = Deck(of_class, sampler, seed=recipe.seed, antithetic=False, like=like) if of_class else None
    vectors = initial_vectors(layout, recipe, [each.name for each in instances]).to(like).requires_grad_()
    optimizer = torch.optim.AdamW([vectors], recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay)
    factor = rise_and_fall(recipe.steps, warmup=max(1, recipe.warmup), floor=recipe.floor)
    rows, history = rates[:, None].to(like), []
    for step in range(recipe.steps):
        batch = deck.deal(recipe.batch_size, step)
        if class_deck is not None:
            batch = batch.beside(class_deck.deal(recipe.batch_size, step), n)
        with bank(model.backbone, layout, vectors * scales):
            errors = denoising_errors(denoiser, batch).view(n, -1)
            losses = errors[:, : recipe.batch_size].mean(1)
            total = losses.sum()
            if class_deck is not None:
                total = total + prior_weight * errors[:, recipe.batch_size :].mean(1).sum()
            (gradient,) = torch.autograd.grad(total, vectors)
        history.append(losses.detach())
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * factor(step)
        descend(vectors, gradient, optimizer, clip=recipe.clip, rates=rows)
    found = vectors.detach() * scales
    with bank(model.backbone, layout, found):
        own = held_out_errors(denoiser, deck, num_pairs=num_pairs, at_once=recipe.batch_size)
    base = held_out_errors(denoiser, deck, num_pairs=num_pairs, at_once=recipe.batch_size)
    # The pairs are the same, so that their differences say more than the two means.
    noise = (base - own).std(1) / math.sqrt(num_pairs) if num_pairs > 1 else torch.zeros(n).to(own)
    told = torch.stack([own.mean(1), base.mean(1), noise], 1)
    return list(torch.cat([found, told, torch.stack(history, 1)], 1).cpu())


def _unpacked(item: tuple[str, str, float], row: Tensor, layout: Layout) -> Trained:
    vector, told, history = row.split([layout.size, 3, len(row) - layout.size - 3])
    loss, base, noise = told.tolist()
    return Trained(item[0], vector, loss, base, history, item[2], noise=noise)
