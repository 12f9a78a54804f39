"""Networks whose weights accelerate keeps elsewhere, and brings to a device for a forward pass alone.

Under accelerate's offloading, a module loads its own weights before it runs and sends them back after. A pass that ends
early leaves the modules around the last site without their second half: weights of their own would stay loaded.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def send_back(model: nn.Module) -> None:
    """Runs what accelerate would have run after each module whose weights are still loaded.

    Args:
        model: A network whose forward pass ended early; without offloading nothing happens.
    """
    for module in model.modules():
        for hook in _hooks_of(vars(module).get("_hf_hook")):
            deep = bool(getattr(hook, "place_submodules", False))
            if getattr(hook, "offload", False) and not all(p.is_meta for p in module.parameters(recurse=deep)):
                hook.post_forward(module, None)


def execution_device(model: nn.Module) -> torch.device | None:
    """Returns the device that an offloaded network computes on; None for a network that keeps its weights.

    Args:
        model: The network, offloaded or not.
    """
    if vars(model).get("_hf_hook") is None:
        return None
    for module in model.modules():
        for hook in _hooks_of(vars(module).get("_hf_hook")):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return None


def _hooks_of(hook: Any) -> Iterator[Any]:
    inner = getattr(hook, "hooks", None)
    if inner is None:
        yield from () if hook is None else (hook,)
    else:
        for each in inner:
            yield from _hooks_of(each)
