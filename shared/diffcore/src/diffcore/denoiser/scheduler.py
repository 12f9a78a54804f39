"""Noise schedules out of diffusers' schedulers, which mix the schedule with one solver."""

import math
from collections.abc import Mapping
from typing import Any

from diffcore.denoiser.schedule import DiscreteSchedule, EDMSchedule, FlowSchedule, NoiseSchedule
from diffcore.errors import IncompatibleModelError, printable


def schedule_from(scheduler: object, *, num_tokens: int = 4096) -> NoiseSchedule:
    """Returns the noise schedule of a diffusers scheduler, given as the object or as its configuration.

    Args:
        scheduler: A scheduler object, or the mapping in its `scheduler_config.json`.
        num_tokens: Image tokens of a sample, for schedulers that shift by them (Flux: 4096 at 1024 by 1024 pixels).

    Raises:
        IncompatibleModelError: The scheduler, or one of its settings, has no counterpart here.
    """
    config: Mapping[str, Any] = scheduler if isinstance(scheduler, Mapping) else getattr(scheduler, "config", {})
    name = str(config.get("_class_name", type(scheduler).__name__))
    if "FlowMatch" in name:
        return _flow_from(config, name, num_tokens)
    if "EDM" in name:
        _refuse(config, name, sigma_schedule=("karras", None))
        fields = ("sigma_min", "sigma_max", "rho", "sigma_data")
        return EDMSchedule(**{field: float(config[field]) for field in fields if field in config})
    if "beta_schedule" in config:
        return _discrete_from(config, name)
    raise IncompatibleModelError(
        f"scheduler {printable(name)} is unknown; schedules are read from DDPM and DDIM relatives, flow-match and EDM"
    )


def _flow_from(config: Mapping[str, Any], name: str, num_tokens: int) -> FlowSchedule:
    off = (False, None)
    _refuse(config, name, invert_sigmas=off, shift_terminal=(None,), stochastic_sampling=off)
    _refuse(config, name, use_karras_sigmas=off, use_exponential_sigmas=off, use_beta_sigmas=off)
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


def _discrete_from(config: Mapping[str, Any], name: str) -> DiscreteSchedule:
    trained = config.get("trained_betas")
    kind = config["beta_schedule"]
    if trained is None:
        _refuse(config, name, beta_schedule=("linear", "scaled_linear", "squaredcos_cap_v2"))
    return DiscreteSchedule(
        num_timesteps=int(config.get("num_train_timesteps", 1000)) if trained is None else len(trained),
        betas=kind if trained is None else tuple(float(beta) for beta in trained),
        beta_start=float(config.get("beta_start", 1e-4)),
        beta_end=float(config.get("beta_end", 0.02)),
        rescale_betas_zero_snr=bool(config.get("rescale_betas_zero_snr", False)),
        spacing=config.get("timestep_spacing", "leading"),
        steps_offset=int(config.get("steps_offset", 0)),
        set_alpha_to_one=bool(config.get("set_alpha_to_one", True)),
    )


def _refuse(config: Mapping[str, Any], name: str, **allowed: tuple[Any, ...]) -> None:
    for key, values in allowed.items():
        if key in config and config[key] not in values:
            raise IncompatibleModelError(
                f"scheduler {printable(name)} has {key} = {printable(config[key])}, which is not supported; "
                f"supported: {', '.join(map(str, values))}"
            )
