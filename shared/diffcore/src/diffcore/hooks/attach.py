"""Forward hooks on modules: which networks accept them, and how they read and replace the tensor at a site."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diffcore.errors import IncompatibleModelError
from diffcore.hooks.match import Site

Visit = Callable[[Tensor], Tensor | None]
"""What happens at a site: None leaves the network alone, a tensor takes the place of the one seen."""

_SPREAD = {"DataParallel", "FullyShardedDataParallel", "FSDPModule"}
_OURS = "set_by_diffcore"
_FUSED_INTO = {
    "to_qkv": {"to_q", "to_k", "to_v"},
    "to_kv": {"to_k", "to_v"},
    "to_added_qkv": {"add_q_proj", "add_k_proj", "add_v_proj"},
}


def require_hookable(model: nn.Module, *, stop: bool = False) -> None:
    """Raises for networks where hooks do not work: compiled, replicated and, with `stop`, sharded ones.

    Raises:
        IncompatibleModelError: A module cannot be hooked; the message names it and the remedy.
    """
    for name, module in model.named_modules():
        kinds = _kinds(type(module))
        compiled = "OptimizedModule" in kinds or getattr(module, "_compiled_call_impl", None) is not None
        if not compiled and not kinds & _SPREAD:  # this runs on every module at every pass
            continue
        where = f"{type(model).__name__}{f' ({name})' if name else ''}"
        if compiled:
            raise IncompatibleModelError(f"{where} is compiled, and hooks on it stay silent; use it before compiling")
        devices = getattr(module, "device_ids", None) or ()
        if "DataParallel" in kinds and len(devices) > 1:
            raise IncompatibleModelError(f"{where} runs on {len(devices)} devices at once; use its .module on one")
        if stop and kinds & {"FullyShardedDataParallel", "FSDPModule"}:
            raise IncompatibleModelError(
                f"{where} is sharded (FSDP), and a forward pass that ends early would leave it gathered; use stop=False"
            )


@cache
def _kinds(kind: type) -> frozenset[str]:
    return frozenset(each.__name__ for each in kind.__mro__)


def require_unfused(model: nn.Module, sites: Iterable[tuple[Site, nn.Module]]) -> None:
    """Raises where a site is a projection that is fused, so that its own module no longer runs.

    Raises:
        IncompatibleModelError: A projection is fused; the message names the site.
    """
    silent = {
        id(getattr(module, part))
        for module in model.modules()
        if is_fused(module)
        for fused, parts in _FUSED_INTO.items()
        if getattr(module, fused, None) is not None
        for part in parts
        if getattr(module, part, None) is not None
    }
    for site, module in sites:
        if id(module) in silent:
            raise IncompatibleModelError(
                f"{site.module!r} is never called while projections are fused; call unfuse_qkv_projections()"
            )


def in_backward() -> bool:
    """Returns whether autograd runs a backward pass on this thread: gradient checkpointing then calls modules again."""
    return torch._C._current_graph_task_id() != -1


def this_thread() -> Callable[[], bool]:
    """Returns a function that tells whether it runs on this thread, as hooks fire on every thread."""
    entered = threading.get_ident()
    return lambda: threading.get_ident() == entered


@contextmanager
def attached(visits: Iterable[tuple[Site, nn.Module, Visit]], *, prepend: bool = False) -> Iterator[None]:
    """Hooks the sites while the block runs, and removes every hook at its end, after errors too."""
    with ExitStack() as stack:
        for site, module, visit in visits:
            on = _on_input(site, visit) if site.at == "input" else _on_output(site, visit)
            stack.callback(put_on(module, on, before=site.at == "input", prepend=prepend).remove)
        yield


def put_on(module: nn.Module, hook: Callable[..., Any], *, before: bool, prepend: bool = False) -> RemovableHandle:
    """Registers a forward hook that `clear` removes.

    Args:
        module: The module that gets the hook.
        hook: Called as (module, args, kwargs) before the module runs, or as (module, args, output) after it.
        before: Whether the hook runs before the module, or after it.
        prepend: Whether the hook goes ahead of those already there.
    """
    setattr(hook, _OURS, True)
    if before:
        return module.register_forward_pre_hook(hook, prepend=prepend, with_kwargs=True)
    return module.register_forward_hook(hook, prepend=prepend)


def clear(model: nn.Module) -> None:
    """Removes every hook of diffcore from a network, should an interruption have left some; other hooks stay."""
    for module in model.modules():
        for hooks, companions in (
            (module._forward_pre_hooks, [module._forward_pre_hooks_with_kwargs]),
            (module._forward_hooks, [module._forward_hooks_with_kwargs, module._forward_hooks_always_called]),
        ):
            for key in [key for key, hook in hooks.items() if hasattr(hook, _OURS)]:
                del hooks[key]
                for companion in companions:
                    companion.pop(key, None)


def first_tensor(values: Iterable[Any]) -> Tensor | None:
    """Returns the first tensor among the arguments of a call, which is what a site at "input" means."""
    return next((value for value in values if isinstance(value, Tensor)), None)


def tensors_in(output: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor that a module returned with the `at` of its site; "output" is the first one."""
    if isinstance(output, Tensor):
        yield "output", output
        return
    first = first_tensor(_elements(output) or [])
    for path, tensor in _leaves(output, ()):
        yield ("output" if tensor is first and len(path) == 1 else "output" + "".join(f"[{i}]" for i in path)), tensor


def _leaves(value: Any, path: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    for index, element in enumerate(_elements(value) or []):
        yield from _leaves(element, (*path, index))


def is_fused(module: nn.Module) -> bool:
    """Returns whether an attention module runs its projections as one."""
    # Not by `getattr`, which is slow on the many modules that lack it.
    if not vars(module).get("fused_projections", False):
        return False
    # Some networks keep the flag after unfusing and only change the processor back; those with `unfuse_projections`
    # have one processor for both.
    switched = type(getattr(module, "processor", None)).__name__.startswith("Fused")
    return switched or hasattr(module, "unfuse_projections")


def _on_output(site: Site, visit: Visit) -> Callable[..., Any]:
    path = site.path

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        del module, args
        # The usual case first: this runs on every module of large networks.
        if isinstance(output, Tensor) and not path:
            return visit(output)
        route = path or _first_tensor(output, site)
        seen = visit(_read(output, route, site))
        return None if seen is None else _write(output, route, seen)

    return hook


def _on_input(site: Site, visit: Visit) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        del module
        for index, value in enumerate(args):
            if isinstance(value, Tensor):
                new = visit(value)
                return None if new is None else ((*args[:index], new, *args[index + 1 :]), kwargs)
        for name, value in kwargs.items():
            if isinstance(value, Tensor):
                new = visit(value)
                return None if new is None else (args, {**kwargs, name: new})
        raise TypeError(f"{site.module!r} was called without a tensor among its arguments")

    return hook


def _elements(output: Any) -> list[Any] | None:
    """Returns the parts of a tuple, a list or one of the output classes that networks return."""
    if isinstance(output, tuple | list):
        return list(output)
    if is_dataclass(output) and not isinstance(output, type):
        return [getattr(output, field.name) for field in fields(output)]
    return None


def _first_tensor(output: Any, site: Site) -> tuple[int, ...]:
    for index, element in enumerate(_elements(output) or []):
        if isinstance(element, Tensor):
            return (index,)
    raise TypeError(f"{site.module!r} returned {type(output).__name__} without a tensor in it")


def _read(output: Any, path: tuple[int, ...], site: Site) -> Tensor:
    value = output
    for index in path:
        elements = _elements(value)
        if elements is None or index >= len(elements):
            raise TypeError(f"{site.module!r} has no {site.at}: it returned {_outline(output)}")
        value = elements[index]
    if not isinstance(value, Tensor):
        raise TypeError(f"{site.at} of {site.module!r} is {_outline(value)}, not a tensor")
    return value


def _write(output: Any, path: tuple[int, ...], new: Tensor) -> Any:
    """Returns a copy of a module's output with one tensor replaced."""
    if not path:
        return new
    elements = _elements(output) or []
    elements[path[0]] = _write(elements[path[0]], path[1:], new)
    if is_dataclass(output) and not isinstance(output, type):
        return replace(output, **{fields(output)[path[0]].name: elements[path[0]]})
    kind: Any = type(output)
    return kind(*elements) if hasattr(output, "_fields") else kind(elements)


def _outline(value: Any) -> str:
    kind = type(value).__name__
    elements = _elements(value)
    return kind if elements is None else f"{kind} of {len(elements)}"
