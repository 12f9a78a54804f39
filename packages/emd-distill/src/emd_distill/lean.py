"""Gradients to a network's input that keep fewer activations, for networks whose weights are constants.

autograd keeps the input of every convolution, although only gradients to weights need it, and the input of every SiLU,
which after a group norm is cheap to compute again. Inside `lean` the residual blocks of diffusers' U-Nets keep their
input and the input of their second norm alone, in one node of the graph. Outside of such blocks, convolutions keep
their weights alone, and a SiLU that follows a group norm keeps what the norm keeps; small activations are kept as they
are there: leaving them out would take more time than their memory is worth. Values and gradients are the same.
Gradients of gradients are not supported.
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
        network: Module whose residual blocks, convolutions, group norms and SiLUs are called; anything else is left
            alone.
        smallest: Number of elements from which on an activation outside of residual blocks is worth leaving out.

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
    changed = []
    for module in modules:
        way = _pass_block if _is_plain_block(module) else ways.get(type(module))
        if way is not None and "forward" not in vars(module):
            changed.append(module)
            module.forward = partial(way, module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _is_plain_block(module: Any) -> bool:
    """Returns whether a module is a residual block of diffusers with constant weights and nothing special."""
    kind = type(module)
    if kind.__name__ != "ResnetBlock2D" or not kind.__module__.startswith("diffusers."):
        return False
    convolutions = [module.conv1, module.conv2, *([] if module.conv_shortcut is None else [module.conv_shortcut])]
    return (
        module.upsample is None
        and module.downsample is None
        and module.time_embedding_norm == "default"
        and not module.skip_time_act
        and type(module.nonlinearity) is nn.SiLU
        and not module.nonlinearity.inplace
        and all(type(norm) is nn.GroupNorm for norm in (module.norm1, module.norm2))
        and all(type(part) is nn.Conv2d and part.padding_mode == "zeros" for part in convolutions)
        and not any("forward" in vars(part) or _has_hooks(part) for part in module.children())
        and not any(part.requires_grad for part in module.parameters())
    )


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _pass_block(module: Any, x: Tensor, temb: Tensor | None, *args: Any, **options: Any) -> Tensor:
    plain = not args and not options and not (module.training and module.dropout.p)
    constant = temb is None or not temb.requires_grad
    if not (plain and constant and _followed(x, 0) and x.is_contiguous(memory_format=_format(x))):
        return type(module).forward(module, x, temb, *args, **options)
    shift = None
    if module.time_emb_proj is not None and temb is not None:
        shift = module.time_emb_proj(functional.silu(temb))[:, :, None, None]
    return _Block.apply(x, shift, module)  # pyright: ignore[reportReturnType]


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


class _Block(torch.autograd.Function):
    """A residual block: twice norm, SiLU and convolution, with a shift by the time between, and its input added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor | None, module: Any) -> Tensor:
        first, second = (_NormPart(norm) for norm in (module.norm1, module.norm2))
        inner, outer = _ConvolutionPart(module.conv1), _ConvolutionPart(module.conv2)
        beside = None if module.conv_shortcut is None else _ConvolutionPart(module.conv_shortcut)
        normed, *of_first = first(x)
        hidden = inner(functional.silu(normed, inplace=True))
        if shift is not None:
            hidden += shift
        normed, *of_second = second(hidden)
        out = outer(functional.silu(normed, inplace=True))
        out += x if beside is None else beside(x)
        if module.output_scale_factor != 1:
            out /= module.output_scale_factor
        ctx.save_for_backward(x, hidden, *of_first, *of_second)
        ctx.parts = first, second, inner, outer, beside, module.output_scale_factor
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, hidden, *statistics = ctx.saved_tensors
        first, second, inner, outer, beside, scale = ctx.parts
        grad = grads[0] / scale if scale != 1 else grads[0]
        found = second.backward_of_silu(outer, grad, hidden, *statistics[2:])
        found = first.backward_of_silu(inner, found, x, *statistics[:2])
        found += grad if beside is None else beside.to_input(grad, x)
        return found, None, None


class _NormPart:
    """A group norm with the weights that it has in the forward pass."""

    def __init__(self, module: nn.GroupNorm) -> None:
        self.weight, self.bias, self.groups, self.eps = module.weight, module.bias, module.num_groups, module.eps

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _ATEN.native_group_norm(x, self.weight, self.bias, *_sizes(x), self.groups, self.eps)

    def backward_of_silu(
        self, convolution: "_ConvolutionPart", grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor
    ) -> Tensor:
        """Returns the gradient to x of norm, SiLU and convolution in a row."""
        normed = self(x)[0]
        back = _ATEN.silu_backward(convolution.to_input(grad, normed), normed)
        return _to_input(back, x, mean, rstd, self.weight, self.groups)


class _ConvolutionPart:
    """A convolution with the weights that it has in the forward pass."""

    def __init__(self, module: Any) -> None:
        self.weight, self.bias = module.weight, module.bias
        self.options = module.stride, module.padding, module.dilation, module.groups

    def __call__(self, x: Tensor) -> Tensor:
        return torch.conv2d(x, self.weight, self.bias, *self.options)

    def to_input(self, grad: Tensor, like: Tensor) -> Tensor:
        """Returns the gradient to the input, of which the shape alone counts."""
        stride, padding, dilation, groups = self.options
        return _ATEN.convolution_backward(
            grad, like, self.weight, None, stride, padding, dilation, False, [0, 0], groups, [True, False, False]
        )[0]


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
