"""The pictures of one subject, and the noisy batches and denoising errors that training and inversion share.

The error of a row is the mean over the mask of (o - target)^2, where o is the network's output for
x_t = alpha x0 + sigma noise, and the target is the noise, x0, velocity or flow, as the model predicts.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from diffcore.denoiser import NetworkDenoiser
from diffcore.digests import add_tensors
from diffcore.errors import UserError
from diffcore.models import DiffusionModel
from diffcore.noise import philox_normal, philox_uniform
from diffcore.train.timesteps import TimeSampler
from w2w_space.pictures import Framed, condition_of, framed, posterior
from w2w_space.recipe import member_rows

# Streams of the draws; training and evaluation differ by an offset.
_PICTURES, _TIMES, _NOISE, _LATENT = 2, 3, 4, 5
EVALUATION = 16
"""Offset of the streams from which fixed pairs of timestep and noise come, which no training sees."""


@dataclass(frozen=True, eq=False)
class Instance:
    """One subject: its pictures as clean samples, and what the model is told about each.

    Attributes:
        name: Name of the subject, on which its random draws depend.
        x0: Clean samples of its pictures in the model's space, such as latents, one row per picture.
        condition: Class labels or text states, one row per picture, or a single row for all.
        mask: Weights in [0, 1] of the places that count in the loss, one row per picture; None counts all alike.
        std: Standard deviations of the samples, of which an autoencoder's posterior has some: each time that a picture
            comes, a sample is drawn. None for samples that are exact.

    Raises:
        ValueError: There is no picture, rows do not fit, or a mask is empty or leaves [0, 1].

    Example:
        >>> digits = Instance("a", torch.zeros(10, 1, 8, 8), {"class_labels": torch.arange(10)})
        >>> len(digits)
        10
    """

    name: str
    x0: Float[Tensor, "k c h w"]
    condition: Mapping[str, Tensor] = field(default_factory=dict)
    mask: Float[Tensor, "k 1 h w"] | None = None
    std: Float[Tensor, "k c h w"] | None = None

    @classmethod
    def from_pictures(
        cls,
        model: DiffusionModel,
        pictures: Sequence[Image.Image],
        *,
        name: str = "subject",
        prompt: str | None = None,
        class_labels: Sequence[int] | None = None,
        masks: Sequence[Image.Image] | None = None,
        size: int | None = None,
    ) -> "Instance":
        """Returns a subject from pictures in memory: cropped to their central squares, resized and encoded once.

        Args:
            model: Model that shall be trained on the subject, or inverted.
            pictures: Pictures of the subject, in any mode and size.
            name: Name of the subject, on which its random draws depend.
            prompt: Text that stands for the subject, the same for all subjects of a population.
            class_labels: Number of the class of each picture, or one for all, for models that draw classes.
            masks: One mask for each picture, bright where places count.
            size: Side of the pictures in pixels; by default what the model was trained for.

        Raises:
            UserError: There are no pictures, a mask is empty or does not fit, or prompt or classes do not suit the
                model.
            IncompatibleModelError: The model came without its autoencoder or its text encoders.

        Example:
            >>> from diffcore.models import from_pipeline
            >>> from diffcore.testing import tiny
            >>> model = from_pipeline(tiny.pipeline("sd15"))
            >>> photo = Image.new("RGB", (40, 30), "red")
            >>> me = Instance.from_pictures(model, [photo], name="me", prompt="a photo of a sks person")
            >>> tuple(me.x0.shape), sorted(me.condition)
            ((1, 4, 8, 8), ['encoder_hidden_states'])
        """
        condition = condition_of(model, prompt=prompt, class_labels=class_labels, size=size)
        return cls.encoded(model, framed(model, pictures, masks, size=size), name, condition)

    @classmethod
    def encoded(cls, model: DiffusionModel, shown: Framed, name: str, condition: Mapping[str, Tensor]) -> "Instance":
        """Returns a subject from pictures that are cropped and resized already.

        Args:
            model: Model whose codec encodes the pictures.
            shown: Pictures with their masks.
            name: Name of the subject.
            condition: Class labels or text states, one row per picture, or a single row for all.
        """
        return cls.of_posterior(name, posterior(model, shown.pixels), condition, shown.mask)

    @classmethod
    def of_posterior(
        cls,
        name: str,
        moments: Float[Tensor, "k 2 c h w"],
        condition: Mapping[str, Tensor],
        mask: Float[Tensor, "k 1 h w"] | None = None,
    ) -> "Instance":
        """Returns a subject from mean and standard deviation of each sample, as `pictures.posterior` returns them.

        Args:
            name: Name of the subject.
            moments: Mean and standard deviation of each picture's sample.
            condition: Class labels or text states, one row per picture, or a single row for all.
            mask: Weights of the places that count; None counts all alike.
        """
        mean, std = moments.unbind(1)
        return cls(name, mean, condition, mask, std if bool(std.any()) else None)

    def __post_init__(self) -> None:
        if len(self.x0) == 0:
            raise ValueError(f"{self.name!r} has no pictures; give at least one row of `x0`")
        for key, value in self.condition.items():
            if len(value) not in (1, len(self.x0)):
                raise ValueError(
                    f"{key!r} of {self.name!r} has {len(value)} rows for {len(self.x0)} pictures; give one or as many"
                )
        if self.mask is not None:
            if not bool(((self.mask >= 0) & (self.mask <= 1)).all()):
                raise ValueError(f"`mask` of {self.name!r} has values outside 0 to 1; divide bytes by 255")
            if bool((self.mask.flatten(1).sum(1) == 0).any()):
                raise ValueError(f"`mask` of {self.name!r} is empty for a picture; mark the places that count")

    def __len__(self) -> int:
        return len(self.x0)

    @cached_property
    def digest(self) -> str:
        """Digest of pictures with their deviations, conditions and masks."""
        digest = hashlib.sha256()
        more = {"mask": self.mask, "std": self.std}
        more = {key: value for key, value in more.items() if value is not None}
        add_tensors(digest, {"x0": self.x0, **self.condition, **more})
        return digest.hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class NoisyBatch:
    """Clean samples with the noise and the timesteps of each row, group by group.

    Attributes:
        x0: Clean samples of the rows.
        t: Timestep of each row.
        noise: Unit normal noise of each row.
        condition: Class labels or text states of each row.
        mask: Weights of the places of each row; None counts all alike.
    """

    x0: Float[Tensor, "b c h w"]
    t: Float[Tensor, " b"]
    noise: Float[Tensor, "b c h w"]
    condition: Mapping[str, Tensor]
    mask: Float[Tensor, "b 1 h w"] | None

    def x_t(self, denoiser: NetworkDenoiser) -> Float[Tensor, "b c h w"]:
        """Returns the noisy samples.

        Args:
            denoiser: Network whose schedule adds the noise.
        """
        return denoiser.schedule.add_noise(self.x0, self.noise, self.t)

    def masked_means(self, values: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
        """Returns the mean of each row's values over its mask, by which places count.

        Args:
            values: Values of each place and channel.
        """
        values = values.mean(1, keepdim=True)
        if self.mask is None:
            return values.flatten(1).mean(1)
        return (self.mask * values).flatten(1).sum(1) / self.mask.flatten(1).sum(1)

    def beside(self, other: "NoisyBatch", groups: int) -> "NoisyBatch":
        """Returns the rows of both batches group by group: those of this one, then as many of the other.

        Args:
            other: Batch of the same groups, whose conditions are of the same kind.
            groups: Number of groups in each batch.
        """

        def joined(one: Tensor, two: Tensor) -> Tensor:
            return torch.cat([one.unflatten(0, (groups, -1)), two.unflatten(0, (groups, -1))], 1).flatten(0, 1)

        masks = [torch.ones_like(each.x0[:, :1]) if each.mask is None else each.mask for each in (self, other)]
        return NoisyBatch(
            joined(self.x0, other.x0),
            joined(self.t, other.t),
            joined(self.noise, other.noise),
            {key: joined(value, other.condition[key]) for key, value in self.condition.items()},
            None if self.mask is None and other.mask is None else joined(*masks),
        )

    def rows(self, index: Int[Tensor, " n"]) -> "NoisyBatch":
        """Returns some of the rows.

        Args:
            index: Places of the rows in the batch.
        """
        condition = {key: value[index] for key, value in self.condition.items()}
        mask = None if self.mask is None else self.mask[index]
        return NoisyBatch(self.x0[index], self.t[index], self.noise[index], condition, mask)


class Deck:
    """Deals noisy pictures of several subjects, so many rows for each; what one gets depends on its name alone.

    Pictures come in random order, all once before one comes again. Timesteps are stratified: one in each of as many
    equal slices of the distribution as a subject has rows. With antithetic noise, every second row has the noise of the
    row before with the opposite sign.

    Args:
        instances: Subjects, the first one's rows first.
        time_sampler: Distribution of the timesteps.
        seed: Seed of all draws.
        antithetic: Whether noise comes in pairs of opposite signs.
        like: Tensor whose device and precision the batches take.
    """

    def __init__(
        self,
        instances: Sequence[Instance],
        time_sampler: TimeSampler,
        *,
        seed: int,
        antithetic: bool,
        like: Tensor,
    ) -> None:
        self._time_sampler, self._seed, self._antithetic = time_sampler, seed, antithetic
        # Pictures that several subjects share, such as those of the class, are held once.
        held = {each.digest: each for each in instances}
        kept, starts = list(held.values()), dict[str, int]()
        for each in kept:
            starts[each.digest] = sum(len(held[digest]) for digest in starts)
        self._x0 = torch.cat([each.x0 for each in kept]).to(like)
        self._counts = torch.tensor([len(each) for each in instances], device=like.device)
        self._firsts = torch.tensor([starts[each.digest] for each in instances], device=like.device)
        self._longest = max(len(each) for each in kept)
        self._rows = member_rows([each.name for each in instances]).to(like.device)
        conditions = {
            key: torch.cat([each.condition[key].expand(len(each), *each.condition[key].shape[1:]) for each in kept])
            for key in instances[0].condition
        }
        self._condition = {
            key: value.to(like) if value.is_floating_point() else value.to(like.device)
            for key, value in conditions.items()
        }
        self._mask = None
        if any(each.mask is not None for each in kept):
            masks = [torch.ones_like(each.x0[:, :1]) if each.mask is None else each.mask for each in kept]
            self._mask = torch.cat(masks).to(like)
        self._std = None
        if any(each.std is not None for each in kept):
            self._std = torch.cat([torch.zeros_like(each.x0) if each.std is None else each.std for each in kept]).to(
                like
            )

    def __len__(self) -> int:
        return len(self._rows)

    def deal(self, size: int, step: int, *, evaluation: bool = False) -> NoisyBatch:
        """Returns rows of all subjects, those of one after those of another.

        Args:
            size: Number of rows of each subject.
            step: Number of the draw; the same one gives the same rows.
            evaluation: Whether to draw from streams apart from those of training.
        """
        offset = EVALUATION if evaluation else 0
        places = torch.arange(size + self._longest, device=self._rows.device)
        # A random number in each round through the pictures, so that sorting keeps the rounds in order.
        rounds = (places[None] // self._counts[:, None]).double()
        u = philox_uniform(self._seed, self._rows, (len(places),), step=step, stream=_PICTURES + offset)
        chosen = (rounds + u).argsort(1)[:, :size] % self._counts[:, None] + self._firsts[:, None]
        index = chosen.flatten()
        x0 = self._x0[index]
        if self._std is not None:
            shape = (size, *self._x0.shape[1:])
            drawn = philox_normal(self._seed, self._rows, shape, step=step, stream=_LATENT + offset)
            x0 = x0 + self._std[index] * drawn.to(x0).flatten(0, 1)
        return NoisyBatch(
            x0,
            self._times(size, step, offset).to(x0),
            self._noise(size, step, offset).to(x0).flatten(0, 1),
            {key: value[index] for key, value in self._condition.items()},
            None if self._mask is None else self._mask[index],
        )

    def _times(self, size: int, step: int, offset: int) -> Float[Tensor, " rows"]:
        u = philox_uniform(self._seed, self._rows, (size,), step=step, stream=_TIMES + offset)
        slices = torch.arange(size, device=u.device)
        u = ((slices + u) / size).clamp(max=1 - torch.finfo(u.dtype).eps / 2)
        return self._time_sampler(u.flatten())

    def _noise(self, size: int, step: int, offset: int) -> Float[Tensor, "n size c h w"]:
        drawn = -(-size // 2) if self._antithetic else size
        shape = (drawn, *self._x0.shape[1:])
        noise = philox_normal(self._seed, self._rows, shape, step=step, stream=_NOISE + offset)
        if not self._antithetic:
            return noise
        return torch.stack([noise, -noise], 2).flatten(1, 2)[:, :size]


def instances_by_name(instances: Sequence[Instance]) -> dict[str, Instance]:
    """Returns subjects by name, after a look at whether they can share a batch.

    Args:
        instances: Subjects in their order.

    Raises:
        UserError: There is none, two have one name, or their conditions or sizes differ.
    """
    if not instances:
        raise UserError("there are no instances; give at least one")
    by_name = {each.name: each for each in instances}
    if len(by_name) < len(instances):
        names = [each.name for each in instances]
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"two instances are called {twice!r}; give each a name of its own")
    first = instances[0]
    for each in instances:
        if set(each.condition) != set(first.condition) or each.x0.shape[1:] != first.x0.shape[1:]:
            raise UserError(
                f"{each.name!r} has other conditions or picture sizes than {first.name!r}; prepare all alike"
            )
    return by_name


def held_out_loss(
    denoiser: NetworkDenoiser,
    deck: "Deck",
    *,
    num_pairs: int,
    at_once: int,
    errors: "Errors | None" = None,
) -> Float[Tensor, " n"]:
    """Returns each subject's mean error on fixed pairs of timestep and noise; arguments as in `held_out_errors`."""
    return held_out_errors(denoiser, deck, num_pairs=num_pairs, at_once=at_once, errors=errors).mean(1)


@torch.no_grad()
def held_out_errors(
    denoiser: NetworkDenoiser,
    deck: "Deck",
    *,
    num_pairs: int,
    at_once: int,
    errors: "Errors | None" = None,
) -> Float[Tensor, "n pairs"]:
    """Returns each subject's errors on fixed pairs of timestep and noise, a few rows of all subjects at a time.

    Args:
        denoiser: Network, with the subjects' adapters attached or without.
        deck: Deck of the subjects' pictures.
        num_pairs: Number of pairs for each subject.
        at_once: Number of rows of each subject in a forward pass.
        errors: Function that returns the error of each row; by default the denoising error.
    """
    batch, n = deck.deal(num_pairs, 0, evaluation=True), len(deck)
    places = torch.arange(n * num_pairs, device=batch.t.device).view(n, num_pairs)
    measure = errors or denoising_errors
    parts = [measure(denoiser, batch.rows(part.flatten())).view(n, -1) for part in places.split(at_once, 1)]
    return torch.cat(parts, 1)


def denoising_errors(denoiser: NetworkDenoiser, batch: NoisyBatch) -> Float[Tensor, " b"]:
    """Returns the error of each row: the mean of its squared differences to the regression target, over the mask.

    Args:
        denoiser: Network with its schedule and prediction type.
        batch: Noisy rows with their conditions.
    """
    prediction = denoiser(batch.x_t(denoiser), batch.t, batch.condition)
    target = prediction.target(batch.x0, batch.noise)
    return batch.masked_means((prediction.output.to(target.dtype) - target).square())


Errors = Callable[[NetworkDenoiser, NoisyBatch], Tensor]
"""Function of the denoiser, with adapters attached, and noisy rows that returns the error of each row."""


def group_means(errors: Float[Tensor, " rows"], groups: int) -> Float[Tensor, " groups"]:
    """Returns the mean error of each of the groups of rows that follow one another.

    Args:
        errors: Error of each row.
        groups: Number of groups, of as many rows each.
    """
    return errors.view(groups, -1).mean(1)
