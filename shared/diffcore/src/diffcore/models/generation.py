"""Generating images for prompts or class labels, each from several seeds.

Image (i, s) is the solver's x0 for condition i, started from x_T = initial_scale(T) z_s with z_s ~ N(0, I). All pairs
(i, s) are rows of the same batches, and a row depends on its own condition and noise alone, so the size of the batches
changes the last bits of an image at most.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffcore.batching import InBatches
from diffcore.denoiser import Condition, GuidedDenoiser, Solver, sample
from diffcore.errors import IncompatibleModelError, printable
from diffcore.models.model import DiffusionModel
from diffcore.noise import row_noise

Generator = Callable[[Tensor, Condition], Tensor]
"""A one-step generator: unit normal noise and conditions, both with b rows, to x0."""


@torch.no_grad()
def generate(
    model: DiffusionModel,
    prompts: Sequence[str] | None = None,
    *,
    seeds: Sequence[int],
    labels: Sequence[int] | Int[Tensor, " prompts"] | None = None,
    condition: Condition | None = None,
    negative_prompt: str = "",
    uncond: Condition | None = None,
    guidance_scale: float = 1.0,
    steps: int = 50,
    solver: Solver = "ddim",
    eta: float = 0.0,
    timesteps: Float[Tensor, " steps"] | None = None,
    clip_x0: float | None = None,
    size: int | None = None,
    seed: int = 0,
    noise: Float[Tensor, "#prompts seeds *data"] | None = None,
    generator: Generator | None = None,
    attached: Callable[[Int[Tensor, " rows"]], AbstractContextManager[Any]] | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 64,
    on_batch: Callable[[int, int], None] | None = None,
) -> Float[Tensor, "prompts seeds *image"]:
    """Generates an image for every pair of a prompt (or label, or condition) and a seed.

    Args:
        model: The diffusion model that generates.
        prompts: One prompt per row of the result; leave them out for models that take none.
        seeds: Seeds of the initial noise; all prompts start from the same noise.
        labels: Class labels, in place of prompts, for class-conditional models.
        condition: Tensors for the backbone with one row per prompt, in place of prompts or labels.
        negative_prompt: Prompt that guidance leads away from; by default the family's empty condition.
        uncond: Tensors with one row that guidance leads away from, in place of `negative_prompt`.
        guidance_scale: Strength of classifier-free guidance; 0 and 1 are off.
        steps: Number of solver steps.
        solver: Kind of step, as in `denoiser.sample`.
        eta: Share of fresh noise per step, as in `denoiser.sample`.
        timesteps: Times to evaluate, as in `denoiser.sample`; a single one uses the denoiser as a one-step generator.
        clip_x0: Bound on predicted x0, as in `denoiser.sample`.
        size: Side of square images in pixels; by default what the model was trained for.
        seed: Key of all noises: the noise of seed s is `row_noise(seed, [s], model.shape)`.
        noise: Unit normal noise to start from in place of that; its first dimension is 1 where prompts share it.
        generator: One-step generator that replaces the solver: called once per batch with (noise, condition).
        attached: Context in which the network runs on each batch, made from the place of the prompt of each row: for
            changes of the network that differ from prompt to prompt. With guidance the network sees all rows of a batch
            without their condition first, and then all rows with it.
        decode: Function from x0 to what is returned; by default the model's codec, which gives images in [0, 1].
        batch_size: Rows per batch, halved when memory runs out; guidance doubles what the backbone sees.
        on_batch: Called after each batch with the number of finished rows and of all rows.

    Returns:
        Images in [0, 1] on the CPU, by prompt and seed; a model without conditions has a single row.

    Raises:
        IncompatibleModelError: The model takes no prompts, or came without text encoders or autoencoder.
        MachineError: Memory does not hold a single row.
        ValueError: Arguments exclude each other, or one that the model needs is missing.

    Example:
        >>> from diffcore.models import from_pipeline, generate
        >>> from diffcore.testing import tiny
        >>> model = from_pipeline(tiny.pipeline("sd15"))
        >>> generate(model, ["a cat", "a dog"], seeds=range(3), steps=2).shape
        torch.Size([2, 3, 3, 16, 16])
    """
    cond = _condition(model, prompts, labels, condition, size, InBatches(batch_size))
    cond = {key: value.to(model.device) for key, value in cond.items()}
    if noise is None:
        dtype = torch.float64 if model.dtype == torch.float64 else torch.float32
        noise = row_noise(seed, seeds, model.shape_at(size), dtype=dtype).unsqueeze(0)
    noise = noise.to(model.device)
    numbers = torch.tensor(list(seeds), device=model.device)
    count = len(next(iter(cond.values()))) if cond else len(noise)
    if not count * len(numbers):
        raise ValueError("there is nothing to generate; give at least one prompt and one seed")
    denoiser = model.denoiser
    if guidance_scale not in (0, 1) and generator is None:
        denoiser = GuidedDenoiser(denoiser, guidance_scale, uncond or null_condition(model, negative_prompt, size))
    solve = partial(sample, denoiser, steps=steps, solver=solver, eta=eta, timesteps=timesteps, clip_x0=clip_x0)
    decoding, decode = InBatches(batch_size), decode or model.codec.decode

    def images_of(rows: Tensor) -> Tensor:
        prompt, place = rows // len(numbers), rows % len(numbers)
        start, given = noise[prompt % len(noise), place], {key: value[prompt] for key, value in cond.items()}
        with nullcontext() if attached is None else attached(prompt):
            x0 = solve(start, given, seeds=numbers[place]) if generator is None else generator(start, given)
        return torch.cat([part.cpu() for part in decoding(x0, decode)])

    images: list[Tensor] = []
    for batch in InBatches(batch_size)(torch.arange(count * len(numbers), device=model.device), images_of):
        images.append(batch)
        if on_batch is not None:
            on_batch(sum(map(len, images)), count * len(numbers))
    return torch.cat(images).unflatten(0, (count, len(numbers)))


def _condition(
    model: DiffusionModel,
    prompts: Sequence[str] | None,
    labels: Sequence[int] | Tensor | None,
    condition: Condition | None,
    size: int | None,
    in_batches: InBatches,
) -> Condition:
    choices = {"prompts": prompts, "labels": labels, "condition": condition}
    given = [name for name, value in choices.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"`{'` and `'.join(given)}` exclude each other; give one of them")
    if condition is not None:
        return condition
    if labels is not None:
        return {"class_labels": torch.as_tensor(labels)}
    if prompts is None:
        cond = model.empty_condition(1)
        if "class_labels" in cond:
            raise ValueError(f"{printable(model.name)} generates images of classes; give `labels`")
        return cond
    if not len(prompts):
        raise ValueError("`prompts` is empty; give at least one")
    if model.prompts is None:
        raise IncompatibleModelError(f"{printable(model.name)} takes no prompts, or came without its text encoders")
    tokens = model.prompts.tokenize(prompts)
    if cut := [text for text in tokens.lost if text]:
        warnings.warn(
            f"{len(cut)} of {len(tokens)} prompts are too long for the text encoder; the first loses "
            f"{printable(cut[0])!r}",
            stacklevel=4,  # beyond `torch.no_grad`
        )
    encode = partial(model.prompts, size=_sides(size))
    parts = list(in_batches(prompts, encode))
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def null_condition(model: DiffusionModel, negative_prompt: str = "", size: int | None = None) -> Condition:
    """Returns the condition, with one row, that guidance leads away from.

    Args:
        model: Model that is guided.
        negative_prompt: Prompt in place of the family's empty condition.
        size: Side of the images in pixels, for backbones that are conditioned on it.

    Raises:
        ValueError: The model has no such condition.
    """
    if model.prompts is not None:
        sides = _sides(size)
        if negative_prompt:
            return model.prompts([negative_prompt], size=sides)
        return model.prompts.unconditional(1, size=sides)
    if type(model.backbone).__name__ == "DiTTransformer2DModel":  # its last class is the one without a label
        return {"class_labels": torch.tensor([int(model.backbone.config["num_embeds_ada_norm"])])}  # pyright: ignore
    raise ValueError(f"guidance needs an `uncond` for {printable(model.name)}; give one, or leave out `guidance_scale`")


def _sides(size: int | None) -> tuple[int, int] | None:
    return None if size is None else (size, size)
