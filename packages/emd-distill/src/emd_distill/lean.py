"""Gradients to a network's input that keep fewer activations, for networks whose weights are constants.

autograd keeps the input of every convolution, although only gradients to weights need it, and the input of every SiLU,
which after a group norm is cheap to compute again. Inside `lean` convolutions keep their weights alone, and a SiLU that
follows a group norm keeps what the norm keeps. Values and gradients are the same. Small activations are kept as they
are: leaving them out would take more time than their memory is worth. Gradients of gradients are not supported.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

_ATEN = torch.ops.aten


@contextmanager
def lean(network: Any, *, smallest: int = 80_000) -> Iterator[None]:
    """Lets a network keep fewer activations while its weights are constants.

    Args:
        network: Module whose convolutions, group norms and SiLUs are called; anything else is left alone.
        smallest: Number of elements from which on an activation is worth leaving out.

    Example:
        >>> net = nn.Sequential(nn.GroupNorm(1, 2), nn.SiLU(), nn.Conv2d(2, 2, 3)).requires_grad_(False)
        >>> x = torch.randn(1, 2, 5, 5, requires_grad=True)
        >>> with lean(net, smallest=0):
        ...     y = net(x)
        >>> torch.allclose(*(torch.autograd.grad(out.sum(), x)[0] for out in (y, net(x))))
        True
    """
    norms: Any = WeakTensorKeyDictionary()  # what made the outputs of group norms that are still there
    ways: dict[type[nn.Module], Any] = {
        nn.Conv2d: partial(_convolve, smallest),
        nn.GroupNorm: partial(_normalise, smallest, norms),
        nn.SiLU: partial(_activate, norms),
    }
    modules = list(network.modules()) if isinstance(network, nn.Module) else []
    changed = [module for module in modules if type(module) in ways and "forward" not in vars(module)]
    for module in changed:
        module.forward = partial(ways[type(module)], module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _convolve(smallest: int, module: nn.Conv2d, x: Tensor) -> Tensor:
    learns = module.weight.requires_grad or (module.bias is not None and module.bias.requires_grad)
    if learns or not _followed(x, smallest) or module.padding_mode != "zeros" or isinstance(module.padding, str):
        return nn.Conv2d.forward(module, x)
    options = module.stride, module.padding, module.dilation, module.groups
    return _Convolution.apply(x, module.weight, module.bias, *options)  # pyright: ignore[reportReturnType]


def _normalise(smallest: int, norms: Any, module: nn.GroupNorm, x: Tensor) -> Tensor:
    learns = module.weight is not None and module.weight.requires_grad
    if learns or not _followed(x, smallest) or not x.is_contiguous(memory_format=_format(x)):
        return nn.GroupNorm.forward(module, x)
    found: Any = _Norm.apply(x, module.weight, module.bias, module.num_groups, module.eps)
    out, mean, rstd = found
    norms[out] = x, mean, rstd, module.weight, module.bias, module.num_groups, module.eps
    return out


def _activate(norms: Any, module: nn.SiLU, x: Tensor) -> Tensor:
    if x not in norms or module.inplace:
        return nn.SiLU.forward(module, x)
    return _NormThenSiLU.apply(x.detach(), *norms[x])  # pyright: ignore[reportReturnType]


def _format(x: Tensor) -> torch.memory_format:
    """Returns the order of elements that torch's own group norm takes a tensor for."""
    return suggest_memory_format(x) if x.ndim == 4 and x.device.type == "cpu" else torch.contiguous_format


def _followed(x: Tensor, smallest: int) -> bool:
    worth = x.requires_grad and x.numel() >= smallest
    return worth and torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.options, ctx.shape = options, x.shape
        return torch.conv2d(x, weight, bias, *options)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (weight,), (stride, padding, dilation, groups) = ctx.saved_tensors, ctx.options
        shape_alone = grads[0].new_empty(1).expand(ctx.shape)
        found = _ATEN.convolution_backward(
            grads[0], shape_alone, weight, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
        )
        return found[0], None, None, None, None, None, None


class _Norm(torch.autograd.Function):
    """A group norm that tells its statistics, which with its input are what `_NormThenSiLU` keeps too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float) -> Any:
        out, mean, rstd = _ATEN.native_group_norm(x, weight, bias, *_sizes(x), groups, eps)
        ctx.save_for_backward(x, mean, rstd, weight)
        ctx.groups = groups
        ctx.mark_non_differentiable(mean, rstd)
        return out, mean, rstd

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, mean, rstd, weight = ctx.saved_tensors
        return _to_input(grads[0], x, mean, rstd, weight, ctx.groups), None, None, None, None


class _NormThenSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, *rest: Any) -> Tensor:
        weight, bias, ctx.groups, ctx.eps = rest
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        return functional.silu(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, mean, rstd, weight, bias = ctx.saved_tensors
        out = _ATEN.native_group_norm(x, weight, bias, *_sizes(x), ctx.groups, ctx.eps)[0]
        grad = _ATEN.silu_backward(grads[0], out)
        return None, _to_input(grad, x, mean, rstd, weight, ctx.groups), None, None, None, None, None, None


def _to_input(grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, groups: int) -> Tensor:
    """Returns the gradient of a group norm to its input."""
    same = grad.contiguous(memory_format=_format(x))
    found = _ATEN.native_group_norm_backward(same, x, mean, rstd, weight, *_sizes(x), groups, [True, False, False])
    return found[0]


def _sizes(x: Tensor) -> tuple[int, int, int]:
    """Returns the numbers of rows, channels and places."""
    return x.shape[0], x.shape[1], x[0, 0].numel()
