"""Which samplers suit a model that was trained on assigned noise: deterministic ones only.

The network learns E[n | x_t], which is what deterministic samplers (DDIM with eta 0, Euler, Heun, DPM-Solver++ without
SDE) use. Stochastic ones take it for a score, which it is only where noise is independent of the image.
"""

import warnings
from collections.abc import Mapping
from typing import Any

_STOCHASTIC = (  # by name: importing diffusers takes seconds, and the package does without it
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DDPMWuerstchenScheduler",
    "UnCLIPScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KarrasVeScheduler",
    "SASolverScheduler",
    "CogVideoXDPMScheduler",
    "DPMSolverSDEScheduler",
    "RePaintScheduler",
    "ScoreSdeVeScheduler",
    "CosineDPMSolverMultistepScheduler",
)
_FROM_THE_SECOND_STEP = (
    "CMStochasticIterativeScheduler",
    "LCMScheduler",
    "FlowMatchLCMScheduler",
    "TCDScheduler",
    "SCMScheduler",
)


def is_stochastic(scheduler: Any, *, eta: float = 0.0, steps: int = 50) -> bool:
    """Tells whether a scheduler of diffusers adds fresh noise between its steps.

    Args:
        scheduler: Scheduler, or a pipeline that has one.
        eta: Share of fresh noise that the pipeline will be called with.
        steps: Number of sampling steps; one step adds no noise in consistency models.

    Example:
        >>> from diffusers import DDIMScheduler, DDPMScheduler
        >>> is_stochastic(DDIMScheduler()), is_stochastic(DDIMScheduler(), eta=1.0), is_stochastic(DDPMScheduler())
        (False, True, True)
    """
    scheduler = getattr(scheduler, "scheduler", scheduler)
    config, kind = getattr(scheduler, "config", {}), type(scheduler).__name__
    if kind in _FROM_THE_SECOND_STEP:
        return steps > 1
    if kind in _STOCHASTIC or str(config.get("algorithm_type", "")).startswith("sde"):
        return True
    if kind == "LTXEulerAncestralRFScheduler":
        return config.get("eta", 1.0) > 0
    return bool(config.get("stochastic_sampling")) or (eta > 0 and "DDIM" in kind)


def warn_if_stochastic(scheduler: Any, trained: Mapping[str, Any], *, eta: float = 0.0, steps: int = 50) -> bool:
    """Warns where a stochastic sampler meets a model that was trained on assigned noise; returns whether it did.

    Args:
        scheduler: Scheduler of diffusers, or a pipeline that has one.
        trained: Facts of the training: the `training.json` beside an exported model, or the metadata of a
            file, with the coupling under `noise`.
        eta: Share of fresh noise that the pipeline will be called with.
        steps: Number of sampling steps.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> warn_if_stochastic(DDIMScheduler(), {"noise": {"method": "assignment"}})
        False
    """
    noise = trained.get("noise")
    method = noise.get("method") if isinstance(noise, Mapping) else noise
    if method in (None, "vanilla") or not is_stochastic(scheduler, eta=eta, steps=steps):
        return False
    name = type(getattr(scheduler, "scheduler", scheduler)).__name__
    warnings.warn(
        f"{name} adds fresh noise between its steps, and this model was trained on noise by {method!r}: its output is "
        "no score, and samples may be ruined; take a deterministic sampler, such as DDIM with eta 0",
        stacklevel=2,
    )
    return True
