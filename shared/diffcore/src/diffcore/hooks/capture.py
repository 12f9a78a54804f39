"""Capturing activations of a network while it runs."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from diffcore.errors import NoMatchError, printable
from diffcore.hooks.attach import Visit, attached, in_backward, require_hookable, require_unfused, this_thread
from diffcore.hooks.match import Site, resolve
from diffcore.hooks.offload import send_back


class Activations(dict[str, Tensor]):
    """The captured tensors by name of their site: the first one of each site in the block.

    Attributes:
        calls: All tensors captured at each site, in order; a module that a forward pass calls twice has two per pass.
        silent: Names of sites whose modules have not run.
    """

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.calls: dict[str, list[Tensor]] = {name: [] for name in names}
        self.silent: set[str] = set(self.calls)

    def add(self, name: str, value: Tensor) -> None:
        """Keeps a value of a site whose module ran."""
        self.setdefault(name, value)
        self.calls[name].append(value)

    def __missing__(self, name: str) -> Tensor:
        shown = f"'{printable(name, 200)}'"
        if name in self.silent:
            raise NoMatchError(f"{shown} was never called in this block; run the forward pass inside it")
        if name in self.calls:
            raise NoMatchError(f"reduce returned nothing for {shown}, so nothing was kept")
        raise NoMatchError(f"{shown} was not captured; captured were: {', '.join(list(self.calls)[:10])}")


class _Finished(BaseException):
    """Ends a forward pass early; no `Exception`, so that no handler inside a network takes it for a failure."""

    def __init__(self, by: Activations) -> None:
        super().__init__()
        self.by = by


@contextmanager
def capture(
    model: nn.Module,
    wanted: str | Site | Iterable[str | Site],
    *,
    reduce: Callable[[str, Tensor], Tensor | None] | None = None,
    stop: bool = False,
    prepend: bool = False,
    grad: bool = False,
) -> Iterator[Activations]:
    """Captures the tensors at sites while the block runs.

    ``with capture(unet, "*.attn2.to_v") as activations: unet(x, t, states)``

    Tensors are copies in the precision of the computation, detached unless `grad` is set: later changes in place, as by
    FreeU, do not reach them. Only calls on the thread that enters the block are captured. Under gradient checkpointing
    the second run, during backward, is not recorded. Edits by an `intervene` block around this one are seen, those by a
    block inside it are not.

    Args:
        model: The network that runs in the block.
        wanted: Patterns as in `match`, sites, or a mixture of both.
        reduce: Called as (name, tensor) each time a module runs; its result is kept instead of the tensor, None keeps
            nothing. So a sweep over a whole network holds statistics instead of activations. The tensor is no copy:
            what is to outlast the call must be computed from it, or returned.
        stop: Whether the forward pass, and with it the block, ends as soon as every site has a tensor. Lines of the
            block after the forward call are then skipped, so put only that call in it.
        prepend: Whether hooks go ahead of those already there, edits among them.
        grad: Whether to keep the graph of the activations, so that gradients flow back to inputs and weights.

    Raises:
        NoMatchError: A pattern or site is not in the network.
        IncompatibleModelError: The network is compiled, replicated, sharded (with `stop`), or a wanted projection
            is fused.
        TypeError: During the forward pass, where `reduce` returns anything else than a tensor or None: what it holds
            would change with the network.
    """
    sites = resolve(model, wanted)
    require_hookable(model, stop=stop)
    require_unfused(model, sites)
    activations = Activations(site.key for site, _ in sites)
    mine = this_thread()

    def visit(name: str) -> Visit:
        def see(x: Tensor) -> None:
            if not mine() or in_backward():
                return
            value = x if grad else x.detach()
            kept = value if reduce is None else reduce(name, value)
            if isinstance(kept, Tensor):
                activations.add(name, kept.clone() if _shares_memory(kept, value) else kept)
            elif kept is not None:
                raise TypeError(f"reduce returned a {type(kept).__name__} for {name!r}; return a tensor, or None")
            activations.silent.discard(name)
            if stop and not activations.silent:
                raise _Finished(activations)

        return see

    try:
        with attached([(site, module, visit(site.key)) for site, module in sites], prepend=prepend):
            yield activations
    except _Finished as finished:
        send_back(model)
        if finished.by is not activations:
            raise


def _shares_memory(kept: Tensor, value: Tensor) -> bool:
    return kept is value or kept.untyped_storage()._cdata == value.untyped_storage()._cdata
