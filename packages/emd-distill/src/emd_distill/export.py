"""A one-step generator as an ordinary diffusion model: the scheduler whose single step gives g(z), and nothing else.

A scheduler's step from timestep t with noise as input is a x + b F(x), with F the network's output. It is the
generator's x0 only if the scheduler starts at the generator's timestep, multiplies the noise by the generator's factor,
and ends at clean data. Measured with diffusers 0.42 (`tests/test_export.py`): LCM, DDPM and DPM-Solver++ do so where
they are given the timestep, and DDIM with `set_alpha_to_one` on a schedule that ends there. DDIM without it and Euler
do not, nor do DPM-Solver++ and UniPC that choose the timestep themselves.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from diffcore.checkpoint.inventory import Component
from diffcore.denoiser import Condition, DiscreteSchedule, FlowSchedule, NetworkDenoiser
from diffcore.denoiser.library import built
from diffcore.errors import IncompatibleModelError, printable
from diffcore.models import DiffusionModel
from emd_distill.generator import OneStepGenerator
from emd_distill.lora import LoraDenoiser


@dataclass(frozen=True, eq=False)
class OneStepModel:
    """A generator in the place of its teacher's network.

    Attributes:
        model: Model with the generator's weights, and the scheduler that takes one step where it has a pipeline.
        generator: The generator as it was trained: around that model's network, or as a LoRA on the teacher's.
        input_factor: Factor a of the input z in x0 = a z + b F(c z), which holds for every generator.
        output_factor: Factor b of the network's output.
        network_factor: Factor c of z where it enters the network.
        network_time: Number that the network is given as its timestep.
    """

    model: DiffusionModel
    generator: OneStepGenerator
    input_factor: float
    output_factor: float
    network_factor: float
    network_time: float


def one_step_scheduler(schedule: DiscreteSchedule, t: int, prediction_type: str, *, plain: bool = False) -> Any:
    """Returns a scheduler of diffusers that goes from pure noise to x0 in the one step `num_inference_steps=1`.

    In the upper half of the timesteps it is an LCM scheduler that counts as many original steps as there are timesteps
    up to t. Lower down LCM cannot be told to start at t; there it is DDIM on the schedule cut off after t.

    Args:
        schedule: Schedule of the teacher.
        t: Timestep at which the generator is called.
        prediction_type: Quantity that the network predicts: epsilon, sample or v_prediction.
        plain: Whether to take DDIM in any case, for pipelines that turn all schedulers into DDIM.

    Raises:
        ValueError: The schedule has no such timestep.

    Example:
        >>> scheduler = one_step_scheduler(DiscreteSchedule(), 600, "epsilon")
        >>> scheduler.set_timesteps(1)
        >>> type(scheduler).__name__, scheduler.timesteps.tolist()
        ('LCMScheduler', [600])
        >>> scheduler = one_step_scheduler(DiscreteSchedule(), 399, "epsilon")
        >>> scheduler.set_timesteps(1)
        >>> type(scheduler).__name__, scheduler.timesteps.tolist()
        ('DDIMScheduler', [399])
    """
    total = schedule.num_timesteps
    if not 0 <= t < total:
        raise ValueError(f"`t` is {t}; the schedule has timesteps 0 to {total - 1}")
    betas = {"beta_schedule": schedule.betas, "beta_start": schedule.beta_start, "beta_end": schedule.beta_end}
    if isinstance(schedule.betas, tuple):
        betas = {"trained_betas": list(schedule.betas)}
    shared = {"prediction_type": prediction_type, "clip_sample": False, "steps_offset": 1}
    if 2 * (t + 1) > total and not plain:
        return built(
            "LCMScheduler",
            {
                **shared,
                **betas,
                "num_train_timesteps": total,
                "rescale_betas_zero_snr": schedule.rescale_betas_zero_snr,
                "original_inference_steps": t + 1,
            },
        )
    bar = schedule.alpha_sigma(torch.arange(t + 1, dtype=torch.float64))[0].square()
    kept = 1 - bar / torch.cat([bar.new_ones(1), bar[:-1]])
    cut = {"trained_betas": kept.tolist(), "num_train_timesteps": t + 1}
    return built(
        "DDIMScheduler",
        {**shared, **cut, "timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False},
    )


def one_step_model(model: DiffusionModel, generator: OneStepGenerator) -> OneStepModel:
    """Returns the teacher's model with a generator in the place of its network.

    A LoRA is merged into the weights.

    Args:
        model: Model of the teacher, whose codec and text encoders go with the generator.
        generator: Trained generator of the same architecture.

    Raises:
        IncompatibleModelError: No pipeline of the model's kind calls its network as the generator does, or the
            generator is of another network.

    Example:
        >>> import copy
        >>> from diffcore.models import from_pipeline
        >>> from diffcore.testing import tiny
        >>> teacher = from_pipeline(tiny.pipeline("sd15"))
        >>> student = OneStepGenerator(copy.deepcopy(teacher.denoiser), 999)
        >>> type(one_step_model(teacher, student).model.scheduler).__name__
        'LCMScheduler'
    """
    whole = merged(generator)
    denoiser = whole.denoiser
    if not isinstance(denoiser, NetworkDenoiser) or type(denoiser.backbone) is not type(model.backbone):
        raise IncompatibleModelError(
            f"the generator is no {type(model.backbone).__name__}, which {printable(model.name)} has; export it with "
            "the teacher that it was distilled from"
        )
    network = denoiser.backbone
    changed = model.with_modules(f"one-step generator at {generator.t!r}", {model.backbone_name: network})
    changed = replace(changed, denoiser=denoiser)
    if model.pipeline_class is not None:
        scheduler = _scheduler_of(model, whole)
        if scheduler is not None:
            changed = replace(changed, components={**model.components, "scheduler": scheduler})
    return OneStepModel(changed, generator, *factors(whole))


def merged(generator: OneStepGenerator) -> OneStepGenerator:
    """Returns a generator with weights of its own: the same where it has some, the sums where it is a LoRA.

    Args:
        generator: Trained generator of either kind.
    """
    denoiser = generator.denoiser
    return OneStepGenerator(denoiser.merged(), generator.t) if isinstance(denoiser, LoraDenoiser) else generator


def factors(generator: OneStepGenerator) -> tuple[float, float, float, float]:
    """Returns a, b, c and tau with g(z) = a z + b F(c z, tau), F being the bare network's output.

    Args:
        generator: One-step generator around a network.
    """
    denoiser = generator.denoiser
    assert isinstance(denoiser, NetworkDenoiser)
    seen: dict[str, Tensor] = {}

    class Fixed(nn.Module):
        """Returns one number whatever it is given, and notes what that was."""

        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            seen.update(x=x, t=t)
            return torch.full_like(x, self.value)

    def answer(z: float, output: float) -> float:
        fixed = NetworkDenoiser(
            Fixed(output), denoiser.schedule, denoiser.prediction_type, sigma_data=denoiser.sigma_data
        )
        return float(OneStepGenerator(fixed, generator.t)(torch.tensor([[z]], dtype=torch.float64)))

    a, b = answer(1.0, 0.0), answer(0.0, 1.0)
    answer(1.0, 0.0)
    return a, b, float(seen["x"]), float(seen["t"])


@torch.no_grad()
def largest_error(
    network: nn.Module, scheduler: Any, wanted: Tensor, z: Tensor, condition: Condition, call: Any
) -> float:
    """Returns the largest difference between what a network and a scheduler draw in one step, and what they should.

    Args:
        network: Network of a pipeline of diffusers.
        scheduler: Scheduler of that pipeline.
        wanted: Samples g(z) of the generator.
        z: Latents that they come from.
        condition: Keyword tensors of the network.
        call: Function that calls the network: (network, x, t, condition) to its output.
    """
    scheduler.set_timesteps(1)
    time = scheduler.timesteps[0]
    x = z * float(getattr(scheduler, "init_noise_sigma", 1.0))
    x_in = scheduler.scale_model_input(x, time) if hasattr(scheduler, "scale_model_input") else x
    dtype = next(network.parameters()).dtype
    given = {key: value.to(dtype) if value.is_floating_point() else value for key, value in condition.items()}
    # FlowMatch pipelines state times up to 1000, and diffcore's call of their networks takes them up to 1.
    at = time / 1000 if type(scheduler).__name__.startswith("FlowMatch") else time
    output = call(network, x_in.to(dtype), at.float().expand(len(z)), given)
    output = output if isinstance(output, Tensor) else output[0]
    output = output[:, : z.shape[1]].float()  # the rest is learned variance
    return float((scheduler.step(output, time, x).prev_sample - wanted).abs().max())


def _scheduler_of(model: DiffusionModel, generator: OneStepGenerator) -> Component | None:
    """Returns the component of the scheduler that takes the step; None where the teacher's own one does."""
    denoiser = generator.denoiser
    assert isinstance(denoiser, NetworkDenoiser)
    schedule = denoiser.schedule
    if isinstance(schedule, FlowSchedule):
        if generator.t != 1.0:
            raise IncompatibleModelError(
                f"the generator is called at t = {generator.t:g}, and pipelines of {printable(model.pipeline_class)} "
                "take one step from t = 1 only; distil with the level 1"
            )
        return None
    if not isinstance(schedule, DiscreteSchedule):
        raise IncompatibleModelError(
            f"pipelines multiply noise by sqrt(sigma^2 + 1) where {printable(model.name)} has EDM's schedule, which is "
            "not what the generator was trained with; export the folder of the bare network instead"
        )
    plain = model.pipeline_class == "DDIMPipeline"
    made = one_step_scheduler(schedule, int(generator.t), denoiser.prediction_type, plain=plain)
    settings: Mapping[str, Any] = {key: value for key, value in made.config.items() if not key.startswith("_")}
    return replace(model.components["scheduler"], class_name=type(made).__name__, config=settings)
