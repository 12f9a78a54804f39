"""Extracting noise schedules from diffusers' schedulers, which combine a schedule with a solver."""

import math
from collections.abc import Mapping
from typing import Any

from diffcore.denoiser.grid import Grid
from diffcore.denoiser.library import built, spaced
from diffcore.denoiser.schedule import DiscreteSchedule, EDMSchedule, FlowSchedule, NoiseSchedule
from diffcore.errors import IncompatibleModelError, printable

PLAIN = ("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "PNDMScheduler")
"""Classes whose times are those of `DiscreteSchedule` itself, but for a single step of "linspace"."""
OTHERS = (
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
"""Classes of the same schedules that are asked for their times."""
EDM = ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler")
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
SCHEDULERS = (*PLAIN, *OTHERS, *EDM, *FLOW)
_OFF = (False, None)


def schedule_from(scheduler: object, *, num_tokens: int = 4096) -> NoiseSchedule:
    """Returns the noise schedule of a diffusers scheduler, given as the object or as its configuration.

    The clamping of predicted x0 and the level of the last step follow the scheduler's class.

    Args:
        scheduler: A scheduler object, or the mapping in its `scheduler_config.json`; absent settings take the class's
            defaults.
        num_tokens: Image tokens of a sample, for schedulers that shift by them (Flux: 4096 at 1024 by 1024 pixels).

    Raises:
        IncompatibleModelError: The scheduler, or one of its settings, has no counterpart here.
        MissingDependencyError: The diffusers library is not installed.
    """
    stated: Mapping[str, Any] = scheduler if isinstance(scheduler, Mapping) else getattr(scheduler, "config", {})
    name = str(stated.get("_class_name", type(scheduler).__name__))
    if name not in SCHEDULERS:
        raise IncompatibleModelError(
            f"scheduler {printable(name)} is not supported; schedules are read from {', '.join(SCHEDULERS)}"
        )
    library = built(name, stated)
    known: Mapping[str, Any] = library.config
    if name in FLOW:
        return _flow_from(known, name, num_tokens)
    if name in EDM:
        _refuse(known, name, sigma_schedule=("karras", None), final_sigmas_type=("zero", None))
        fields = ("sigma_min", "sigma_max", "rho", "sigma_data")
        return EDMSchedule(**{field: float(known[field]) for field in fields})
    return _discrete_from({**known, **stated}, known, name, library)


def _flow_from(config: Mapping[str, Any], name: str, num_tokens: int) -> FlowSchedule:
    _refuse(config, name, invert_sigmas=_OFF, shift_terminal=(None,), stochastic_sampling=_OFF)
    _refuse(config, name, use_karras_sigmas=_OFF, use_exponential_sigmas=_OFF, use_beta_sigmas=_OFF)
    if config.get("use_dynamic_shifting"):
        _refuse(config, name, time_shift_type=("exponential",))
        return FlowSchedule(math.exp(_shift_exponent(config, num_tokens)))
    shift = float(config.get("shift", 1.0))
    lowest = 1 / int(config.get("num_train_timesteps", 1000))
    # diffusers shifts its lowest level when the scheduler is built, and once more with the grid.
    return FlowSchedule(shift, last_time=shift * lowest / (1 + (shift - 1) * lowest))


def _shift_exponent(config: Mapping[str, Any], num_tokens: int) -> float:
    """Returns mu, linear in the tokens; its defaults are those of Flux's pipeline."""
    few, many = float(config.get("base_image_seq_len", 256)), float(config.get("max_image_seq_len", 4096))
    low, high = float(config.get("base_shift", 0.5)), float(config.get("max_shift", 1.15))
    return low + (high - low) * (num_tokens - few) / (many - few)


def _discrete_from(config: Mapping[str, Any], known: Mapping[str, Any], name: str, library: Any) -> DiscreteSchedule:
    """Returns a schedule: its levels as the configuration states them, its solver as the class knows it."""
    _refuse(known, name, thresholding=_OFF, use_flow_sigmas=_OFF)
    _refuse(known, name, timestep_type=("discrete",), interpolation_type=("linear",))
    trained = config.get("trained_betas")
    kind = config["beta_schedule"]
    if trained is None:
        _refuse(config, name, beta_schedule=("linear", "scaled_linear", "squaredcos_cap_v2"))
    spacing = known.get("timestep_spacing", "linspace")
    return DiscreteSchedule(
        num_timesteps=int(config["num_train_timesteps"]) if trained is None else len(trained),
        betas=kind if trained is None else tuple(float(beta) for beta in trained),
        beta_start=float(config["beta_start"]),
        beta_end=float(config["beta_end"]),
        rescale_betas_zero_snr=bool(config.get("rescale_betas_zero_snr", False)),
        spacing=spacing,
        steps_offset=int(known.get("steps_offset", 0)),
        set_alpha_to_one=_ends_clean(known, library),
        clip_x0=float(known.get("clip_sample_range", 1.0)) if known.get("clip_sample") else None,
        grid=None if name in PLAIN and spacing != "linspace" else Grid.of(name, _plain(known)),
    )


def _ends_clean(known: Mapping[str, Any], library: Any) -> bool:
    """Returns whether the last step ends at clean data, by the class or by the last of its own noise levels."""
    if "set_alpha_to_one" in known:
        return bool(known["set_alpha_to_one"])
    if not hasattr(library, "sigmas"):
        return True
    return float(spaced(type(library).__name__, known, 2).sigmas[-1]) == 0


def _plain(known: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings as JSON holds them: lists for arrays, no notes, and no evaluations inside PNDM's first steps."""
    settings = {key: value for key, value in known.items() if not key.startswith("_")}
    settings |= {"skip_prk_steps": True} if "skip_prk_steps" in known else {}
    return {key: value.tolist() if hasattr(value, "tolist") else value for key, value in settings.items()}


def _refuse(config: Mapping[str, Any], name: str, **allowed: tuple[Any, ...]) -> None:
    for key, values in allowed.items():
        if key in config and config[key] not in values:
            raise IncompatibleModelError(
                f"scheduler {printable(name)} has {key} = {printable(config[key])}, which is not supported; "
                f"supported: {', '.join(map(str, values))}"
            )
