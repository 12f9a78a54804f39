"""Comparing the noise schedule tables that trainers store beside weights with the schedule a model is loaded with.

They repeat the noise schedule and the scale of the latents. Where they differ, the weights were trained under another
schedule than their family's, and nothing else in the file shows it.
"""

import re
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from diffcore.checkpoint.stored import Stored
from diffcore.denoiser import DiscreteSchedule
from diffcore.errors import IncompatibleModelError, printable

_TABLES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "betas": lambda alpha, sigma: 1 - (alpha / torch.cat([torch.ones_like(alpha[:1]), alpha[:-1]])).square(),
    "alphas_cumprod": lambda alpha, sigma: alpha.square(),
    "sqrt_alphas_cumprod": lambda alpha, sigma: alpha,
    "sqrt_one_minus_alphas_cumprod": lambda alpha, sigma: sigma,
    "sigmas": lambda alpha, sigma: sigma / alpha,
    "log_sigmas": lambda alpha, sigma: (sigma / alpha).log(),
}
CHECKED = re.compile(rf"(denoiser\.)?({'|'.join(_TABLES)})|scale_factor")
"""Names of the tables."""


def check_buffers(stored: Stored, schedule: DiscreteSchedule, scaling: float | None) -> None:
    """Compares every table of a single file with the schedule and scale of the model.

    Args:
        stored: The tensors of the single file.
        schedule: The schedule of the model; tables from before its shift to zero terminal SNR pass too.
        scaling: Scale factor of the latents; None without an autoencoder.

    Raises:
        IncompatibleModelError: A table is of another schedule or scale.
    """
    names = [name for name in stored.shapes if CHECKED.fullmatch(name)]
    index = torch.arange(schedule.num_timesteps, dtype=torch.float64)
    levels = [each.alpha_sigma(index) for each in {schedule, replace(schedule, rescale_betas_zero_snr=False)}]
    for name, table in stored.read(names):
        if name == "scale_factor":
            expected = [] if scaling is None else [torch.tensor([scaling], dtype=torch.float64)]
        else:
            expected = [_TABLES[name.removeprefix("denoiser.")](alpha, sigma) for alpha, sigma in levels]
        if expected and not any(_agree(table, each) for each in expected):
            raise IncompatibleModelError(
                f"{printable(stored.where, 300)} was trained under another noise schedule or scale than its family: "
                f"its {printable(name)} is not the usual one; load its diffusers folder, which says which it is"
            )


def _agree(table: Tensor, expected: Tensor) -> bool:
    """Returns whether two tables are equal within the stored precision; a closing 0 is ignored."""
    values = table.double().flatten()
    if len(values) == len(expected) + 1 and values[0] * values[-1] == 0:
        values = values[values != 0]
    if len(values) != len(expected):
        return False
    coarse = torch.finfo(table.dtype).eps if table.is_floating_point() else 0.0
    tolerance = max(4 * coarse, 1e-3) * expected.abs() + 1e-6
    return any(bool(((order - expected).abs() <= tolerance).all()) for order in (values, values.flip(0)))
