"""Applying low-rank changes: fusing them into a copy of a network, or adding them to its outputs in a with-block."""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from diffcore.adapters.adapter import Changes, LowRank
from diffcore.errors import UserError
from diffcore.hooks import Site, clear
from diffcore.hooks.attach import put_on, require_hookable, require_unfused

CHANGEABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Modules whose weight a LoRA can change."""


def fuse(network: nn.Module, changes: Changes, scale: float = 1.0) -> nn.Module:
    """Returns a copy of a network with changes added to its weights; all other weights are shared, not copied.

    Sums are formed in float32 or wider and rounded once to the weight's type. The copy carries no hook of diffcore.

    Args:
        network: The network to copy; it stays as it is.
        changes: Low-rank changes by dotted module name.
        scale: Strength: 1 is what the adapter was trained for, 0 is off.

    Raises:
        ValueError: A module is missing, is not linear or convolutional, or its weight has another shape.
        IncompatibleModelError: A module is out of use while projections are fused.
        UserError: A weight overflows its type.
    """
    _check(network, changes, scale)
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    copy = deepcopy(network, shared)
    clear(copy)
    finite: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, change in changes.items():
            module = copy.get_submodule(name)
            old: Any = module.weight
            wide = torch.promote_types(old.dtype, torch.float32)
            new = (old.to(wide) + scale * _moved(change, old.device).delta(wide)).to(old.dtype)
            finite[name] = new.isfinite().all()
            module.weight = nn.Parameter(new, requires_grad=old.requires_grad)
    if finite and not bool(torch.stack([flag.cpu() for flag in finite.values()]).all()):
        name = next(name for name, flag in finite.items() if not bool(flag))
        raise UserError(f"the change of {name!r} overflows its weight; use bfloat16 or float32, or a smaller scale")
    return copy


@contextmanager
def apply(network: nn.Module, changes: Changes, scale: float | Float[Tensor, " b"] = 1.0) -> Iterator[None]:
    """Adds changes to the outputs of a network's modules while the block runs; weights stay as they are.

    Hooks that look at the modules see the changed outputs.

    Args:
        network: The network whose outputs change.
        changes: Low-rank changes by dotted module name.
        scale: Strength of the changes: one number, or one for each row of the batch.

    Raises:
        ValueError: As in `fuse`; also in a forward pass whose batch has another number of rows than `scale`.
        IncompatibleModelError: The network is compiled, or a module is out of use while projections are fused.
    """
    _check(network, changes, scale)
    require_hookable(network)
    with ExitStack() as stack:
        for name, change in changes.items():
            module = network.get_submodule(name)
            hook = _adding(name, module, change, scale)
            stack.callback(put_on(module, hook, before=False, prepend=True).remove)
        yield


def _adding(name: str, module: Any, change: LowRank, scale: float | Tensor) -> Callable[..., Tensor]:
    like = module.weight
    strength = change.alpha / change.rank * (scale if isinstance(scale, float | int) else 1.0)
    down = change.down.to(like)
    up = (strength * change.up.to(torch.promote_types(change.up.dtype, torch.float32))).to(like)
    rows = scale.to(like) if isinstance(scale, Tensor) else None

    def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        added = _passed(module, args[0], down, up)
        if rows is not None:
            if len(rows) != len(added):
                raise ValueError(f"`scale` has {len(rows)} rows, the input of {name!r} has {len(added)}")
            added = rows.view(-1, *(1 for _ in added.shape[1:])) * added
        return output + added

    return hook


def _passed(module: nn.Module, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    if isinstance(module, nn.Linear):
        return F.linear(F.linear(x, down), up)
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    # The module's own way of sliding, padding included, with other weights.
    inner = module._conv_forward(x, down, None)
    return torch.einsum("or,br...->bo...", up, inner)


def _check(network: nn.Module, changes: Changes, scale: float | Tensor) -> None:
    if not isinstance(scale, Tensor) and not math.isfinite(scale):
        raise ValueError(f"`scale` is {scale}; it must be finite")
    modules = dict(network.named_modules())
    for name, change in changes.items():
        module = modules.get(name)
        if not isinstance(module, CHANGEABLE):
            what = "no such module" if module is None else type(module).__name__
            raise ValueError(f"{type(network).__name__} cannot be changed at {name!r}: {what}")
        if tuple(module.weight.shape) != change.shape:
            raise ValueError(f"weight of {name!r} has shape {tuple(module.weight.shape)}, its change {change.shape}")
    require_unfused(network, [(Site(name), modules[name]) for name in changes])


def _moved(change: LowRank, device: torch.device) -> LowRank:
    return LowRank(change.down.to(device), change.up.to(device), change.alpha)
