"""Delayed injection: edited weights only below a timestep T, which keeps the layout of the picture (section 6.5).

Steps with t > T use the subject's own adapter, steps with t <= T the edited one, in both branches of guidance alike. T
counts in the scheduler's timesteps, not in steps: with 1000 of them, T = 1000 is the plain edit, 700 to 1000 change the
whole, 400 to 700 details (paper, appendix I).
"""

import copy
from collections.abc import Callable
from typing import Any

import torch

from diffcore.denoiser import NoiseSchedule
from diffcore.errors import UserError
from w2w_space.swap import adapter_names, backbone_of

StepCallback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]
"""What diffusers' pipelines take as `callback_on_step_end`."""


def inject(
    pipeline: Any, original: str, edited: str, timestep: float | int, *, num_inference_steps: int
) -> StepCallback:
    """Returns a callback for one pipeline that switches from the original to the edited adapter at a timestep.

    The adapter of the first step is set at once, and again after the last step, so that the pipeline can be called
    several times; a call that was interrupted needs a new callback.

    Args:
        pipeline: Pipeline of diffusers into which both adapters were loaded.
        original: Name of the adapter for steps above the timestep.
        edited: Name of the adapter for steps at the timestep and below.
        timestep: The largest timestep T of the scheduler at which the edited adapter is used.
        num_inference_steps: Number of steps, as the pipeline is called with.

    Returns:
        Callback to pass to the pipeline as `callback_on_step_end`.

    Raises:
        UserError: An adapter of this name is not loaded.
        ValueError: Later, in the first step, if the pipeline runs with other timesteps.

    Example:
        >>> from diffcore.testing import tiny
        >>> from peft import LoraConfig
        >>> pipeline = tiny.pipeline("sd15")
        >>> for name in ("own", "older"):
        ...     pipeline.unet.add_adapter(LoraConfig(r=1, target_modules=["to_q", "to_v"]), name)
        >>> callback = inject(pipeline, "own", "older", 500, num_inference_steps=4)
        >>> pipeline.unet.active_adapters()
        ['own']
    """
    network = backbone_of(pipeline)
    for name in (original, edited):
        if name not in adapter_names(network):
            raise UserError(
                f"the pipeline has no adapter {name!r}; it has {', '.join(adapter_names(network)) or 'none'}; "
                "load it with `adapter_name`"
            )
    planned = copy.deepcopy(pipeline.scheduler)
    planned.set_timesteps(num_inference_steps)
    times: list[float] = [float(t) for t in planned.timesteps]

    def switch(t: float) -> None:
        network.set_adapters(original if t > timestep else edited)

    def at_step_end(running: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        del running, t
        if step == 0 and [float(t) for t in pipeline.scheduler.timesteps] != times:
            raise ValueError(
                f"the pipeline runs with other timesteps than those of `num_inference_steps` {num_inference_steps}; "
                "make the callback for the number of steps that the pipeline is called with"
            )
        switch(times[(step + 1) % len(times)])
        return tensors

    switch(times[0])
    return at_step_end


def translated(timestep: float | int, source: NoiseSchedule, target: NoiseSchedule) -> float:
    """Returns the time at which another schedule has the same signal-to-noise ratio, for T of models of another kind.

    Args:
        timestep: Timestep in the units of the source.
        source: Schedule in which the timestep is meant, such as Stable Diffusion's.
        target: Schedule of the model at hand, such as that of a flow.

    Example:
        >>> from diffcore.denoiser import DiscreteSchedule, FlowSchedule
        >>> stable_diffusion = DiscreteSchedule(betas="scaled_linear", beta_start=0.00085, beta_end=0.012)
        >>> round(translated(700, stable_diffusion, FlowSchedule()), 2)
        0.77
    """
    return float(target.timestep_at(source.log_snr(torch.tensor([timestep], dtype=torch.float64)))[0])
