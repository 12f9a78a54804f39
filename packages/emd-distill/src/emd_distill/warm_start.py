"""Generators that do not come from the teacher's weights: smaller networks, other latents, and a start for them.

EM Distillation needs samples that are somewhere near the teacher's, or its scores say nothing. A generator with random
weights is first regressed to what the teacher predicts in one call from pure noise,

    minimise over g  E |g(z, c) - D(kappa n(z), t, c)|^2,

which is where a generator from the teacher's weights starts. The noise n is z itself, where latents have the shape of
samples. Else it is Q z with a fixed matrix Q of orthonormal rows or columns; what a shorter latent leaves open is drawn
anew each time, so that n is standard normal in either case, and g learns the mean over it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffcore.denoiser import Denoiser, NetworkDenoiser
from diffcore.errors import UserError, printable
from diffcore.noise import philox_normal
from emd_distill.chain import Generator
from emd_distill.draws import WARM_REST, WARM_Z, Conditions

_LIFT_SEED = 23


def warm_start(
    generator: nn.Module,
    start: Generator,
    shape: Sequence[int],
    *,
    data_shape: Sequence[int] | None = None,
    conditions: Conditions | None = None,
    steps: int = 1000,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
    on_step: Callable[[int], object] | None = None,
) -> Float[Tensor, " steps"]:
    """Trains a generator, in place, to draw what another one draws in one call; returns the loss of each step.

    The losses are mean squares over the numbers of a sample. For latents in the shape of samples they can fall to zero;
    a shorter latent leaves the variance of what it does not hold.

    Args:
        generator: Network (z, condition) to samples with random weights.
        start: Generator that is imitated, usually `OneStepGenerator(teacher, t)`, whose latent has the shape of a
            sample.
        shape: Shape of one latent of the generator.
        data_shape: Shape of one sample, where it differs from that of a latent.
        conditions: Conditions of each step; None for a model without any.
        steps: Number of Adam's steps, whose learning rate falls to zero along half a cosine.
        batch_size: Number of rows in a step.
        learning_rate: Learning rate of the first step.
        seed: Seed of all random draws.
        on_step: Called with the number of finished steps.

    Raises:
        ValueError: A number is out of its range.

    Example:
        >>> from emd_distill.digits import SHAPE, digit_classes, load_teacher
        >>> from emd_distill.generator import OneStepGenerator
        >>> class Small(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = nn.Linear(16 + 10, 64)
        ...     def forward(self, z, condition):
        ...         classes = nn.functional.one_hot(condition["class_labels"], 10)
        ...         return self.net(torch.cat([z, classes], 1)).view(-1, *SHAPE)
        >>> start = OneStepGenerator(load_teacher(), 2.5)
        >>> losses = warm_start(Small(), start, (16,), data_shape=SHAPE, conditions=digit_classes, steps=50)
        >>> bool(losses[-1] < losses[0])
        True
    """
    for name, value in (("steps", steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"`{name}` is {value}; give at least 1")
    if not learning_rate > 0:
        raise ValueError(f"`learning_rate` is {learning_rate}; it must be positive")
    shape, data = tuple(shape), tuple(data_shape or shape)
    generator.eval()  # a function of its latent, as it will be trained
    parameters = list(generator.parameters())
    for part in parameters:
        part.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, learning_rate)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rows = torch.arange(batch_size, device=parameters[0].device)
    losses = []
    for step in range(steps):
        z = philox_normal(seed, rows, shape, step=step, stream=WARM_Z)
        rest = None if shape == data else philox_normal(seed, rows, data, step=step, stream=WARM_REST)
        condition = None if conditions is None else conditions(step, rows)
        with torch.no_grad():
            goal = start(lifted(z, rest), condition).float()
        loss = (generator(z, condition).float() - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()
        losses.append(loss.detach())
        if on_step is not None:
            on_step(step + 1)
    return torch.stack(losses).cpu()


def lifted(z: Float[Tensor, "b *latent"], rest: Float[Tensor, "b *data"] | None) -> Float[Tensor, "b *data"]:
    """Returns standard normal noise in the shape of samples that holds as much of the latents as it can.

    Args:
        z: Latents of the rows, standard normal.
        rest: Standard normal noise in the shape of samples, for what the latents leave open; None where latents have
            that shape, and are the noise.

    Example:
        >>> lifted(torch.randn(5, 3), torch.randn(5, 2, 4)).shape
        torch.Size([5, 2, 4])
    """
    if rest is None:
        return z
    flat, open_ = z.flatten(1), rest.flatten(1)
    short, long = sorted((flat.shape[1], open_.shape[1]))
    drawn = philox_normal(_LIFT_SEED, torch.arange(long), (short,)).double()
    matrix = torch.linalg.qr(drawn).Q.to(flat)  # (long, short) with orthonormal columns
    if flat.shape[1] == long:
        return (flat @ matrix).view_as(rest)
    return (flat @ matrix.T + open_ - open_ @ matrix @ matrix.T).view_as(rest)


def smaller(teacher: NetworkDenoiser, width: float, *, seed: int = 0) -> NetworkDenoiser:
    """Returns a denoiser of the teacher's architecture with fewer channels, and random weights.

    Args:
        teacher: Denoiser around a U-Net of diffusers.
        width: Share of the teacher's channels in each level, in (0, 1); rounded up to whole groups of its norms.
        seed: Seed of the weights.

    Raises:
        ValueError: The width is out of its range.
        UserError: The teacher is no U-Net of diffusers, or no network can be built at this width.

    Example:
        >>> from diffcore.testing import tiny
        >>> teacher = tiny.denoiser("unet2d")
        >>> half = smaller(teacher, 0.5)
        >>> sum(p.numel() for p in half.parameters()) < 0.5 * sum(p.numel() for p in teacher.parameters())
        True
    """
    if not 0 < width < 1:
        raise ValueError(f"`width` is {width}; it must lie between 0 and 1")
    own = channels_of(teacher)
    if own is None:
        raise UserError(
            f"a {type(teacher.backbone).__name__} is no U-Net of diffusers whose channels could be cut; give a network "
            "of your own to `warm_start`"
        )
    config: Any = teacher.backbone.config
    group = math.lcm(config.get("norm_num_groups") or 1, *_heads(config))
    channels = [math.ceil(width * count / group) * group for count in own]
    if channels == own:
        raise UserError(
            f"`width` is {width}, and channels come in whole groups of {group}, which leaves the teacher's "
            f"{printable(own)}; give a smaller one"
        )
    return with_channels(teacher, channels, seed=seed)


def channels_of(denoiser: Denoiser) -> list[int] | None:
    """Returns the channels of each level of a denoiser's U-Net; None where it is none of diffusers.

    Args:
        denoiser: Denoiser whose network is looked at.
    """
    config: Mapping[str, Any] = getattr(getattr(denoiser, "backbone", None), "config", {})
    return list(config["block_out_channels"]) if "block_out_channels" in config else None


def with_channels(teacher: NetworkDenoiser, channels: Sequence[int], *, seed: int = 0) -> NetworkDenoiser:
    """Returns a denoiser of the teacher's architecture with other numbers of channels, and random weights.

    Args:
        teacher: Denoiser around a U-Net of diffusers.
        channels: Number of channels in each level.
        seed: Seed of the weights.

    Raises:
        UserError: No network can be built with them.
    """
    backbone: Any = teacher.backbone
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            network = type(backbone).from_config({**backbone.config, "block_out_channels": list(channels)})
        except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
            raise UserError(
                f"no {type(backbone).__name__} can be built with channels {printable(list(channels))}: "
                f"{printable(error, 200)}; give another `width`"
            ) from error
    parameter = next(teacher.parameters())
    if network.dtype != parameter.dtype:
        network.to(parameter.dtype)
    return NetworkDenoiser(
        network.to(parameter.device), teacher.schedule, teacher.prediction_type,
        sigma_data=teacher.sigma_data, call=teacher.call,
    )  # fmt: skip


def _heads(config: Mapping[str, Any]) -> list[int]:
    """Returns the numbers that channels must be multiples of for the sake of attention."""
    stated = config.get("num_attention_heads") or config.get("attention_head_dim") or 1
    return [int(count) for count in (stated if isinstance(stated, list | tuple) else [stated]) if count]
