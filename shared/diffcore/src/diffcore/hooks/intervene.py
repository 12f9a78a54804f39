"""Editing activations while a network runs; weights and library code stay as they are."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from diffcore.hooks.attach import Visit, attached, in_backward, require_hookable, require_unfused, this_thread
from diffcore.hooks.match import Site, resolve

Edit = Tensor | Callable[[Tensor], Tensor]
"""A tensor multiplies the activation, a function maps it to another of the same shape, dtype and device."""

Branch = Literal["both", "cond", "uncond"]
"""Which rows of a guided pass: the batch is (uncond, cond), half each."""


@contextmanager
def intervene(model: nn.Module, edits: Mapping[str | Site, Edit], *, branch: Branch = "both") -> Iterator[None]:
    """Edits activations while the block runs.

    ``with intervene(unet, {"*.attn2.to_v": mask}): unet(x, t, states)``

    A mask with one row per sample, (b, 1, width) for tokens or (b, width, 1, 1) for maps, tries many edits in one
    forward pass. Blocks nest: edits apply in the order in which they were entered. Only the thread that enters the
    block is affected. With gradient checkpointing, put the backward pass inside the block too: it runs modules again.

    Args:
        model: The network that runs in the block.
        edits: The edit of each pattern or site. Functions must not change their argument in place.
        branch: Rows that are edited; "cond" and "uncond" are for guided passes, and the edit then sees that half only.

    Raises:
        NoMatchError: A pattern or site is not in the network.
        IncompatibleModelError: The network is compiled or replicated, or a projection is fused.
        TypeError: An edit did not return a tensor.
        ValueError: An edit returned another shape, dtype or device, worked in place, or a batch has no two halves.
    """
    visits = [
        (site, module, _visit(site, edit, branch, this_thread()))
        for wanted, edit in edits.items()
        for site, module in resolve(model, wanted)
    ]
    require_hookable(model)
    require_unfused(model, [(site, module) for site, module, _ in visits])
    with attached(visits):
        yield


def _visit(site: Site, edit: Edit, branch: Branch, mine: Callable[[], bool]) -> Visit:
    def change(x: Tensor) -> Tensor | None:
        # A recomputation must repeat the edit, and on accelerators autograd runs it on a thread of its own.
        if not mine() and not in_backward():
            return None
        if branch == "both":
            return _edited(site, edit, x)
        if len(x) % 2:
            raise ValueError(f"{site.key!r} has {len(x)} rows, but branch={branch!r} needs pairs of (uncond, cond)")
        uncond, cond = x.chunk(2)
        halves = [uncond, _edited(site, edit, cond)] if branch == "cond" else [_edited(site, edit, uncond), cond]
        return torch.cat(halves)

    return change


def _edited(site: Site, edit: Edit, x: Tensor) -> Tensor:
    if isinstance(edit, Tensor):
        if edit.ndim > x.ndim or any(m not in (1, n) for m, n in zip(edit.shape[::-1], x.shape[::-1], strict=False)):
            raise ValueError(f"the mask of {site.key!r} has shape {tuple(edit.shape)}; {tuple(x.shape)} is masked")
        return x * edit.to(x)
    version = None if x.is_inference() else x._version
    new = edit(x)
    if not isinstance(new, Tensor):
        raise TypeError(f"the edit of {site.key!r} returned {type(new).__name__}, not a tensor")
    if (new.shape, new.dtype, new.device) != (x.shape, x.dtype, x.device):
        raise ValueError(f"the edit of {site.key!r} returned {_described(new)}; it must keep {_described(x)} as it is")
    if version is not None and x._version != version:
        raise ValueError(f"the edit of {site.key!r} changed its argument in place; return a new tensor")
    return new


def _described(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)} on {x.device}"
