"""The adversarial search: prompt embeddings e that make a model generate a given image x_0, without its prompt.

Ablating the neurons that recognise a prompt hides an image; it need not remove it from the weights. So the search
minimises E |f(x_t, t, e) - target|^2 over noise n and timestep t, with x_t = alpha_t x_0 + sigma_t n and the edited
network f.

References:
    Kowalczuk et al., "Finding Dori: Memorization in Text-to-Image Diffusion Models Is Less Local Than Assumed", 2025.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from diffcore.batching import InBatches
from diffcore.denoiser import Condition
from diffcore.models import DiffusionModel
from diffcore.noise import philox_normal, philox_uniform, row_noise
from diffcore.train.timesteps import default_time_sampler
from nemo_localize import protocol

STATES = "encoder_hidden_states"
_TIMES, _STARTS = 1, 2  # streams of draws; 0 is the noise
STARTS = ("caption", *(f"noise {number + 1}" for number in range(protocol.AUDIT_NOISE_STARTS)))


def starting_embeddings(states: Float[Tensor, "prompts tokens width"]) -> Float[Tensor, "prompts starts tokens width"]:
    """Returns the embeddings from which the searches for each prompt start: its own, and standard normal noise."""
    noise = row_noise(protocol.AUDIT_SEED, range(protocol.AUDIT_NOISE_STARTS), states.shape[1:], stream=_STARTS)
    noise = noise.to(states).expand(len(states), *noise.shape)
    return torch.cat([states[:, None], noise], 1)


def search_embeddings(
    model: DiffusionModel,
    cond: Condition,
    starts: Float[Tensor, "jobs tokens width"],
    targets: Sequence[Float[Tensor, "_ *data"]],
    *,
    batch_size: int = 64,
) -> Float[Tensor, "jobs tokens width"]:
    """Returns the embedding that each search ends at, whatever searches share its batches.

    All searches see the same noise and timesteps, in the same order.

    Args:
        model: A text-conditioned U-Net; ablate neurons around the call to attack it without them.
        cond: Condition with one row per search; its text embeddings are replaced.
        starts: Embeddings from which the searches start.
        targets: Latents of the images that each search aims at.
        batch_size: Number of rows per forward pass.

    Raises:
        MachineError: Memory does not hold one search.
    """
    draws = protocol.AUDIT_DRAWS
    device = next(model.backbone.parameters()).device
    shape = targets[0].shape[1:]
    x0 = torch.stack([target[torch.arange(draws) % len(target)] for target in targets]).to(device)

    def work(rows: range) -> Tensor:
        jobs = slice(rows.start, rows.stop)
        embeddings = starts[jobs].detach().to(device, torch.promote_types(starts.dtype, torch.float32)).clone()
        embeddings.requires_grad_()
        others = {key: value[jobs].to(device) for key, value in cond.items() if key != STATES}
        optimizer = torch.optim.Adam([embeddings], lr=protocol.AUDIT_LEARNING_RATE)
        for step in range(protocol.AUDIT_STEPS):
            noise, t = _drawn(model, shape, step, x0.dtype, device)
            with torch.enable_grad():
                loss = _loss(model, embeddings, others, x0[jobs], noise, t, starts.dtype)
            (embeddings.grad,) = torch.autograd.grad(loss, embeddings)
            optimizer.step()
        return embeddings.detach().to(starts.dtype)

    return torch.cat(list(InBatches(max(batch_size // draws, 1))(range(len(starts)), work)))


def _drawn(
    model: DiffusionModel, shape: Sequence[int], step: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Returns fresh noise and timesteps."""
    rows, seed = range(protocol.AUDIT_DRAWS), protocol.AUDIT_SEED
    noise = philox_normal(seed, rows, shape, step=step, device=device, dtype=dtype)
    uniform = philox_uniform(seed, rows, (1,), step=step, stream=_TIMES, device=device)
    return noise, default_time_sampler(model.denoiser.schedule)(uniform[:, 0])


def _loss(
    model: DiffusionModel,
    embeddings: Tensor,
    others: Condition,
    x0: Float[Tensor, "jobs draws *data"],
    noise: Float[Tensor, "draws *data"],
    t: Float[Tensor, " draws"],
    dtype: torch.dtype,
) -> Tensor:
    """Returns the sum over searches of their mean squared errors, so that each has its own gradient."""
    count, draws = x0.shape[:2]
    flat, noise, t = x0.flatten(0, 1), noise.repeat(count, *[1] * (noise.ndim - 1)), t.repeat(count)
    cond = {key: value.repeat_interleave(draws, 0) for key, value in others.items()}
    cond[STATES] = embeddings.to(dtype).repeat_interleave(draws, 0)
    prediction = model.denoiser(model.denoiser.schedule.add_noise(flat, noise, t), t, cond)
    error = (prediction.output - prediction.target(flat, noise)).square()
    return error.flatten(1).mean(1).unflatten(0, (count, draws)).mean(1).sum()
