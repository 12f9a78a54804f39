"""Many adapters of one kind in a single forward pass of their frozen base.

With N adapters and b rows for each, in the order of the adapters, the base computes all N b rows at once; a hook on
each changed module adds B_i A_i x to the rows x of adapter i, as two batched products of matrices:

    y = W x + bmm(bmm(x, A^T), B^T),    x of shape (N, rows of one adapter, inputs).

Outputs and gradients are those of the adapters one by one. The gradient of a sum of losses, one for each adapter, holds
each adapter's own gradient in its row, and an optimiser that works number by number is N optimisers.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffcore.errors import IncompatibleModelError
from diffcore.hooks import Site
from diffcore.hooks.attach import put_on, require_hookable, require_unfused
from w2w_space.layout import Layout


@contextmanager
def bank(network: nn.Module, layout: Layout, vectors: Float[Tensor, "n size"]) -> Iterator[None]:
    """Applies one adapter to each group of rows that follow one another, while the block runs.

    Batches hold as many rows for each adapter, those of the first adapter first. Guidance that doubles the batch breaks
    this order. Gradients reach `vectors`; a backward pass with gradient checkpointing belongs inside the block.

    Args:
        network: The frozen base model's network; its weights stay as they are.
        layout: Table of the vectors, linear modules alone.
        vectors: One vector per adapter, with the change's scale in B; they may require gradients.

    Raises:
        IncompatibleModelError: The layout holds a convolution or a module that the network lacks, a shape differs, or
            the network is compiled or fused.
        ValueError: In a forward pass whose rows cannot be shared out equally among the adapters.

    Example:
        >>> network = nn.Sequential(nn.Linear(3, 4))
        >>> layout = Layout.of({"0": (4, 3)}, rank=1)
        >>> x, vectors = torch.randn(6, 3), torch.stack([torch.zeros(7), torch.ones(7)])
        >>> with bank(network, layout, vectors):
        ...     changed = network(x)
        >>> torch.allclose(changed[:3], network(x[:3])), torch.allclose(changed[3:], network(x[3:]))
        (True, False)
    """
    modules = changed_modules(network, layout)
    with ExitStack() as stack:
        for name, (down, up) in layout.factors(vectors).items():
            hook = _adding(name, down.transpose(1, 2), up.transpose(1, 2))
            stack.callback(put_on(modules[name], hook, before=False, prepend=True).remove)
        yield


def changed_modules(network: nn.Module, layout: Layout) -> dict[str, nn.Linear]:
    """Returns the modules of a network that a layout's adapters change, checked as `bank` needs them.

    Args:
        network: The base model's network.
        layout: Table of the adapters' vectors.

    Raises:
        IncompatibleModelError: As for `bank`.
    """
    require_hookable(network)
    modules, found = dict(network.named_modules()), dict[str, nn.Linear]()
    for name, shape in zip(layout.modules, layout.shapes, strict=True):
        module = modules.get(name)
        if len(shape) > 2 or isinstance(module, nn.modules.conv._ConvNd):
            raise IncompatibleModelError(
                f"{name!r} is a convolution, and adapters are trained together in linear modules alone; "
                "leave convolutions out of the layout"
            )
        if not isinstance(module, nn.Linear):
            what = "no such module" if module is None else f"a {type(module).__name__} there"
            raise IncompatibleModelError(
                f"{type(network).__name__} cannot be changed at {name!r}: it has {what}; take the base model that the "
                "adapters were made for"
            )
        if tuple(module.weight.shape) != shape:
            raise IncompatibleModelError(
                f"the weight of {name!r} has shape {tuple(module.weight.shape)}, and the adapters change {shape}; "
                "take the base model that they were made for"
            )
        found[name] = module
    require_unfused(network, [(Site(name), module) for name, module in found.items()])
    return found


def _adding(name: str, down: Tensor, up: Tensor) -> Callable[..., Tensor]:
    """Returns a hook that adds changes, from A^T of shape (n, inputs, rank) and B^T of shape (n, rank, outputs)."""

    def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x: Tensor = args[0]
        if len(x) % len(down):
            raise ValueError(f"{name!r} was called with {len(x)} rows, which {len(down)} adapters cannot share equally")
        inner = torch.bmm(x.reshape(len(down), -1, x.shape[-1]), down.to(x.dtype))
        wide = output.reshape(len(up), -1, output.shape[-1])
        return torch.baddbmm(wide, inner, up.to(output.dtype)).view_as(output)

    return hook
