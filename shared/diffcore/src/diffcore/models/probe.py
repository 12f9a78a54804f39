"""Which sites of a model patterns match, what leaves them, and what a forward pass costs until there."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diffcore.errors import IncompatibleModelError
from diffcore.hooks import capture, match
from diffcore.models.backbones import condition_keys
from diffcore.models.model import DiffusionModel


def probe_sites(model: DiffusionModel, patterns: Sequence[str]) -> list[dict[str, Any]]:
    """Runs one forward pass on noise and returns a row per matching module.

    Args:
        model: Loaded; its prompts, if it takes any, are empty.
        patterns: As in `hooks.match`.

    Returns:
        Rows with `module`, `shape` (of one batch row; None for a module that does not run) and `cost`: floating point
        operations of the pass when the module is done, as a share of all.

    Raises:
        NoMatchError: A pattern matches nothing.
    """
    sites = match(model.backbone, patterns)
    x_t, t, cond = example_inputs(model)
    seen: dict[str, tuple[tuple[int, ...], int]] = {}
    with FlopCounterMode(display=False) as counter, torch.no_grad():

        def note(name: str, value: Tensor) -> None:
            seen.setdefault(name, (tuple(value.shape), counter.get_total_flops()))

        with capture(model.backbone, sites, reduce=note):
            model.denoiser(x_t, t, cond)
    total = max(counter.get_total_flops(), 1)
    rows = []
    for site in sites:
        shape, flops = seen.get(site.key, (None, 0))
        rows.append({"module": site.key, "shape": None if shape is None else list(shape[1:]), "cost": flops / total})
    return rows


def example_inputs(model: DiffusionModel) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Returns one row of noise in the shape the model was trained for, a middle timestep, and an empty condition."""
    t = model.denoiser.schedule.timesteps(3)[1:2].to(model.device, torch.float32)
    noise = torch.randn(1, *model.shape, generator=torch.Generator().manual_seed(0)).to(model.device)
    return noise, t, empty_condition(model, 1)


def empty_condition(model: DiffusionModel, count: int) -> dict[str, Tensor]:
    """Returns the condition of no prompt, or of class 0.

    Raises:
        IncompatibleModelError: The model takes prompts and came without its text encoders.
    """
    if model.prompts is not None:
        return dict(model.prompts.unconditional(count))
    required = condition_keys(model.backbone).required
    if required == ("class_labels",):
        return {"class_labels": torch.zeros(count, dtype=torch.int64, device=model.device)}
    if required:
        raise IncompatibleModelError(
            f"{model.name} takes {', '.join(required)} and came without text encoders; point to its pipeline folder"
        )
    return {}
