"""Sampling: one batched loop from noise to data.

Every solver takes the same step, `x' = alpha' x0 + sigma' noise`, and differs in the x0 and noise it puts in:

* "ddim": the prediction itself. With `eta` > 0 a part of the noise is drawn anew (eta = 1 is ancestral sampling).
* "euler": the same without `eta`. In sigma / alpha as well as in flow time, Euler's step is the DDIM step.
* "heun": the slope averaged over both ends of the step; 2 steps - 1 calls. The slope is the noise, taken over
  sigma / alpha, or the flow field over flow time.

The form above divides by nothing at alpha = 0, so a schedule with zero terminal SNR needs no special case, except that
Heun's first step from there, infinitely long in sigma / alpha, is not corrected.

References:
    DDIM: Song et al. 2021, equations 12 and 16. Heun: Karras et al. 2022, algorithm 1.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffcore.denoiser.denoiser import Condition, Denoiser
from diffcore.denoiser.prediction import Prediction
from diffcore.denoiser.schedule import FlowSchedule, NoiseSchedule
from diffcore.noise import philox_normal

Solver = Literal["ddim", "euler", "heun"]
Level = tuple[float, float]  # alpha, sigma
Pair = tuple[Tensor, Tensor]  # x0, noise

_STREAM = int.from_bytes(b"eta")  # keeps the sampler's draws apart from others of the same seed


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    noise: Float[Tensor, "b *data"],
    cond: Condition | None = None,
    *,
    steps: int = 50,
    solver: Solver = "ddim",
    eta: float = 0.0,
    timesteps: Float[Tensor, " steps"] | None = None,
    on_step: Callable[[int, Prediction], None] | None = None,
    seeds: Int[Tensor, " b"] | None = None,
    clip_x0: float | None = None,
) -> Float[Tensor, "b *data"]:
    """Turns noise into clean samples; each row depends on its own noise, condition and seed alone.

    Args:
        denoiser: The denoiser to sample from; its schedule gives the noise levels.
        noise: Unit normal noise; it is scaled here to the first noise level.
        cond: Condition that every call of the denoiser gets.
        steps: Number of solver steps, at least 1.
        solver: One of the solvers in the module's description.
        eta: Share of fresh noise in [0, 1]; with "ddim" only.
        timesteps: The times to evaluate, noisiest first, in place of the schedule's own grid of `steps`.
        on_step: Called with the step's index and the prediction at its start.
        seeds: One seed per row, for the fresh noise of `eta` > 0; their low 32 bits count.
        clip_x0: Bound on predicted x0 (after guidance), which is clamped to [-clip_x0, clip_x0], as in pixel-space
            DDPM; the noise follows from the clamped value. None takes the schedule's, inf is off.

    Returns:
        x0 in float32, or float64 for float64 noise.

    Raises:
        ValueError: An option is out of its range, or the denoiser says nothing about x0 at a noise level of the grid.
    """
    _check_options(solver, eta, seeds)
    schedule = denoiser.schedule
    times = schedule.timesteps(steps) if timesteps is None else timesteps.double().cpu()
    levels = _levels(schedule, times)
    clip_x0 = schedule.clip_x0 if clip_x0 is None else clip_x0
    state = noise if noise.dtype == torch.float64 else noise.float()
    state = state * float(schedule.initial_scale(times[0]))

    def predict(x: Tensor, index: int) -> Prediction:
        t = torch.full((len(x),), float(times[index]), dtype=x.dtype, device=x.device)
        prediction = denoiser(x, t, cond)
        _check_level(prediction, levels[index], float(times[index]))
        return replace(prediction, in_range=True)

    in_flow_time = isinstance(schedule, FlowSchedule)
    for index in range(len(times)):
        here, there = levels[index], levels[index + 1]
        prediction = predict(state, index)
        if on_step is not None:
            on_step(index, prediction)
        pair = _clean_and_noise(prediction, here, clip_x0)
        if eta > 0:
            assert seeds is not None  # by _check_options
            following = _renewed_step(pair, here, there, eta, seeds, index)
        else:
            following = _step(pair, there)
        if solver == "heun" and index + 1 < len(times) and (in_flow_time or here[0] > 0):
            end = _clean_and_noise(predict(following, index + 1), there, clip_x0)
            following = _step(_averaged(state, here, pair, end, in_flow_time), there)
        state = following
    return state


def _step(pair: Pair, there: Level) -> Tensor:
    x0, noise = pair
    return there[0] * x0 + there[1] * noise


def _renewed_step(pair: Pair, here: Level, there: Level, eta: float, seeds: Tensor, index: int) -> Tensor:
    """DDIM with fresh noise; in ratios of sigma / alpha it holds for every schedule, not only alpha² + sigma² = 1."""
    x0, noise = pair
    ratio = there[1] * here[0] / (there[0] * here[1])
    renewed = eta * there[1] * math.sqrt(max(1 - ratio**2, 0.0))
    kept = math.sqrt(there[1] ** 2 - renewed**2)
    fresh = philox_normal(0, seeds, x0.shape[1:], step=index, stream=_STREAM, device=x0.device, dtype=x0.dtype)
    return there[0] * x0 + kept * noise + renewed * fresh


def _averaged(x: Tensor, here: Level, start: Pair, end: Pair, in_flow_time: bool) -> Pair:
    """Returns the x0 and noise at `x` whose slope is the mean of the slopes at both ends."""
    alpha, sigma = here
    if in_flow_time:
        flow = (start[1] - start[0] + end[1] - end[0]) / 2
        return x - sigma * flow, x + alpha * flow
    noise = (start[1] + end[1]) / 2
    return (x - sigma * noise) / alpha, noise


def _clean_and_noise(prediction: Prediction, level: Level, clip_x0: float | None) -> Pair:
    if clip_x0 is None or math.isinf(clip_x0):
        return prediction.x0, prediction.noise
    x0 = prediction.x0.clamp(-clip_x0, clip_x0)
    return x0, (prediction.x_t - level[0] * x0) / level[1]


def _levels(schedule: NoiseSchedule, times: Tensor) -> list[Level]:
    """Returns (alpha, sigma) of every time and of the clean end, on the host: the loop asks the device nothing."""
    alpha, sigma = schedule.alpha_sigma(times)
    return [*zip(alpha.tolist(), sigma.tolist(), strict=True), schedule.clean_alpha_sigma()]


def _check_options(solver: str, eta: float, seeds: Tensor | None) -> None:
    if solver not in get_args(Solver):
        raise ValueError(f"`solver` is {solver!r}; it must be one of {', '.join(get_args(Solver))}")
    if not 0 <= eta <= 1:
        raise ValueError(f"`eta` is {eta}; it must lie in [0, 1]")
    if eta > 0 and solver != "ddim":
        raise ValueError(f"`eta` is {eta} with `solver` {solver}; only ddim draws fresh noise")
    if eta > 0 and seeds is None:
        raise ValueError(f"`eta` is {eta} without `seeds`; pass one seed per row")


def _check_level(prediction: Prediction, level: Level, t: float) -> None:
    """Checks as `Prediction` does that x0 and noise exist at a level, from numbers on the host."""
    if prediction.kind == "epsilon" and level[0] == 0:
        raise ValueError(f"a prediction of kind epsilon says nothing about x0 at t = {t:g}, where alpha is 0")
    if prediction.kind in ("sample", "edm") and level[1] == 0:
        raise ValueError(f"a prediction of kind {prediction.kind} lacks the noise at t = {t:g}, where sigma is 0")
