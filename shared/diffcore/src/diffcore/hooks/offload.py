"""Sending weights back that accelerate brought to a device for a forward pass which then ended early.

Under accelerate's offloading, a module loads its own weights before it runs and sends them back after. A pass that ends
early leaves the modules around the last site without their second half: weights of their own would stay loaded.
"""

from collections.abc import Iterator
from typing import Any

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


def _hooks_of(hook: Any) -> Iterator[Any]:
    inner = getattr(hook, "hooks", None)
    if inner is None:
        yield from () if hook is None else (hook,)
    else:
        for each in inner:
            yield from _hooks_of(each)
