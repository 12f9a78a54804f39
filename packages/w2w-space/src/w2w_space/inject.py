"""Delayed injection: edited weights only below a timestep T, which keeps the layout of the picture (section 6.5).

Steps with t > T use the subject's own adapter, steps with t <= T the edited one, in both branches of guidance alike. T
counts in the scheduler's timesteps, not in steps: with 1000 of them, T = 1000 is the plain edit, 700 to 1000 change the
whole, 400 to 700 details (paper, appendix I).
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from diffcore.denoiser import NoiseSchedule
from diffcore.errors import UserError
from w2w_space.swap import adapter_names, backbone_of

StepCallback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]
"""What diffusers' pipelines take as `callback_on_step_end`."""


def inject(
    pipeline: Any,
    original: str,
    edited: str,
    timestep: float | int,
    *,
    num_inference_steps: int = 50,
    timesteps: Sequence[float | int] | None = None,
) -> StepCallback:
    """Returns a callback for one pipeline that switches from the original to the edited adapter at a timestep.

    The adapter of the first step is set at once, and again after the last step, so that the pipeline can be called
    several times; a call that was interrupted needs a new callback. All later timesteps are the pipeline's own, as it
    runs, with whatever shift it gives them; the first one alone must be known beforehand.

    Args:
        pipeline: Pipeline of diffusers into which both adapters were loaded.
        original: Name of the adapter for steps above the timestep.
        edited: Name of the adapter for steps at the timestep and below.
        timestep: The largest timestep T of the scheduler at which the edited adapter is used.
        num_inference_steps: Number of steps, as the pipeline is called with; it tells the first timestep.
        timesteps: Timesteps that the pipeline runs, where they do not follow from the number of steps alone, as where
            it starts from a picture; the first one is enough.

    Returns:
        Callback to pass to the pipeline as `callback_on_step_end`.

    Raises:
        UserError: An adapter of this name is not loaded.
        ValueError: `timesteps` is empty; or later, after the first step, if that was on the other side of the timestep.

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
    if timesteps is not None and len(timesteps) == 0:
        raise ValueError("`timesteps` is empty; give those that the pipeline runs, or leave it out")
    first = float(timesteps[0]) if timesteps is not None else _first_timestep(pipeline.scheduler, num_inference_steps)
    places: list[int] = []

    def switch(t: float) -> None:
        network.set_adapters(original if t > timestep else edited)

    def at_step_end(running: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        del running
        now, times = float(t), [float(each) for each in pipeline.scheduler.timesteps]
        if step == 0:
            places.clear()
            if (now > timestep) != (first > timestep):
                raise ValueError(
                    f"the pipeline began at timestep {now:g}, and {first:g} was expected, on the other side of "
                    f"{timestep:g}; give `num_inference_steps` as the pipeline is called with, or its `timesteps`"
                )
        # Pipelines that start from a picture leave the first timesteps out, and some solvers take a timestep twice.
        place = times.index(now, places[-1] + 1 if places else 0)
        places.append(place)
        switch(times[place + 1] if place + 1 < len(times) else first)
        return tensors

    switch(first)
    return at_step_end


def _first_timestep(scheduler: Any, num_inference_steps: int) -> float:
    """Returns the timestep at which a pipeline begins from noise alone."""
    planned = copy.deepcopy(scheduler)
    # The shift of flow models depends on the picture's size, and leaves the first time, pure noise, as it is.
    shift = {"mu": 1.0} if planned.config.get("use_dynamic_shifting") else {}
    planned.set_timesteps(num_inference_steps, **shift)
    return float(planned.timesteps[0])


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
