"""A table of every tensor inside a network: its site, its dimensions, and the FLOPs of a forward pass up to it.

The table is read from one forward pass on the meta device, which computes shapes and no numbers. A network of the size
of SDXL takes about a second, and weights are neither moved nor needed.
"""

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffcore.errors import NoMatchError, printable
from diffcore.hooks.attach import first_tensor, tensors_in
from diffcore.hooks.layout import grid_of
from diffcore.hooks.match import Site, modules_of

Axes = Literal[
    "",
    "channels",
    "channels height width",
    "tokens channels",
    "heads tokens channels",
    "tokens heads channels",
]
"""What the dimensions of a tensor are, without the batch; empty where they are none of these."""

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class SiteRow:
    """One tensor inside a network.

    Attributes:
        site: The tensor's site, as `capture` takes it.
        kind: Class name of the module.
        shape: Shape of one batch row, or of the whole tensor where it has no rows, as a table of positions; None for a
            module that the forward pass does not run.
        axes: Meaning of each dimension of `shape`, in words.
        channels: Number of channels, over all heads; None where `axes` is empty.
        grid: Rows and columns of image tokens or positions; None for text and vectors.
        num_text: Number of text tokens. They come first where the tensor holds image places too.
        calls: Number of times the tensor appears in one forward pass; all else describes the first time.
        flops: Floating point operations of the forward pass up to the tensor.
        cost: Share of the whole forward pass's operations up to the tensor, from 0 to 1.
        same_as: Name of an earlier row that is the very same tensor, if there is one.
    """

    site: Site
    kind: str
    shape: tuple[int, ...] | None = None
    axes: Axes = ""
    channels: int | None = None
    grid: tuple[int, int] | None = None
    num_text: int = 0
    calls: int = 0
    flops: int = 0
    cost: float = 0.0
    same_as: str | None = None

    @property
    def name(self) -> str:
        """The module's name, followed by ":input" or ":output[1]" where the tensor is not its first output."""
        return self.site.key


@dataclass(frozen=True)
class SiteTable:
    """All tensors inside a network, in the order in which a forward pass makes them; what never runs comes last.

    Attributes:
        rows: One row per tensor, in the order of the forward pass.
        flops: Floating point operations of one whole forward pass with one batch row.
    """

    rows: tuple[SiteRow, ...]
    flops: int

    def __iter__(self) -> Iterator[SiteRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> SiteRow:
        if name not in self._by_name:
            raise NoMatchError(f"no site is called '{printable(name, 200)}'; list all rows of the table")
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, SiteRow]:
        return {row.name: row for row in self.rows}

    def match(self, patterns: str | Sequence[str]) -> "SiteTable":
        """Returns the rows whose names match any of the patterns.

        Args:
            patterns: Shell patterns such as "*.attn2.to_q" or "*.attn1:input", in which `*` crosses dots.

        Raises:
            NoMatchError: A pattern matches no row.
        """
        found: set[str] = set()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            hits = {row.name for row in self.rows if fnmatchcase(row.name, pattern)}
            if not hits:
                raise NoMatchError(
                    f"no site matches '{printable(pattern, 200)}'; list all with: diffcore hooks MODEL '*'"
                )
            found |= hits
        return replace(self, rows=tuple(row for row in self.rows if row.name in found))

    @property
    def cost(self) -> float:
        """Share of a forward pass that is run until all these sites have fired; 1 where one of them never does."""
        return max((row.cost if row.calls else 1.0 for row in self.rows), default=0.0)

    def to_rows(self) -> list[dict[str, Any]]:
        """Returns plain values for JSON and CSV, one dictionary per row."""
        return [
            {"name": row.name, "module": row.site.module, "at": row.site.at}
            | {name: value for name, value in vars(row).items() if name != "site"}
            for row in self.rows
        ]


def trace_sites(
    network: Network, forward: Callable[[Network], object], *, size: tuple[int, int], num_text: int = 0
) -> SiteTable:
    """Lists every tensor that enters or leaves a module during one forward pass, computed on the meta device.

    Floating point operations are those of matrix products, convolutions and attention, two per multiplication.

    Args:
        network: The network; it is neither changed nor run.
        forward: Runs its argument, a copy of the network on the meta device, on inputs of one row on the meta device.
        size: Height and width of the sample, by which grids of places are known.
        num_text: Number of text tokens in the inputs; a sequence of this length is taken for text.

    Example:
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=2, padding=1), torch.nn.Conv2d(8, 8, 1))
        >>> x = torch.empty(1, 3, 16, 16, device="meta")
        >>> table = trace_sites(network, lambda meta: meta(x), size=(16, 16))
        >>> [(row.name, row.channels, row.grid, round(row.cost, 2)) for row in table.match(["0", "1"])]
        [('0', 8, (8, 8), 0.77), ('1', 8, (8, 8), 1.0)]
    """
    meta = on_meta(network)
    trace = _Trace(meta, size, num_text)
    with torch.no_grad(), trace.counter:
        forward(meta)
    return trace.table()


def on_meta(network: Network) -> Network:
    """Returns a copy on the meta device, in float32 and without any hooks; no weight is copied."""
    twins: dict[nn.Module, nn.Module] = {}

    def twin_of(module: nn.Module) -> nn.Module:
        if module not in twins:
            twin = twins[module] = copy.copy(module)
            # Offloading puts a `forward` of its own, which brings weights to a device, before that of the class.
            twin.__dict__ = {name: value for name, value in vars(module).items() if name != "forward"}
            twin.__dict__ |= {name: OrderedDict() for name in vars(module) if name.endswith(("_hooks", "_with_kwargs"))}
            twin._parameters = {name: _emptied(value) for name, value in module._parameters.items()}
            twin._buffers = {name: _emptied(value) for name, value in module._buffers.items()}
            twin._modules = {name: child and twin_of(child) for name, child in module._modules.items()}
        return twins[module]

    return cast(Network, twin_of(network))


def _emptied(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    empty = torch.empty_like(tensor, device="meta", dtype=dtype)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


@dataclass
class _Seen:
    """The first appearance of a tensor, and the number of appearances."""

    kind: str
    flops: int
    shape: tuple[int, ...]
    same_as: str | None
    calls: int = 1


@dataclass
class _Trace:
    """Watches the modules of a network on the meta device."""

    network: nn.Module
    size: tuple[int, int]
    num_text: int
    counter: FlopCounterMode = field(default_factory=lambda: FlopCounterMode(display=False))
    seen: dict[Site, _Seen] = field(default_factory=dict)
    owners: dict[tuple[int, int], str] = field(default_factory=dict)
    alive: list[Tensor] = field(default_factory=list)  # keeps the identity of tensors unique

    def __post_init__(self) -> None:
        for name, module in modules_of(self.network).items():
            module.register_forward_pre_hook(lambda m, a, k, name=name: self._before(name, m, a, k), with_kwargs=True)
            module.register_forward_hook(lambda m, a, out, name=name: self._after(name, m, out))

    def _before(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        tensor = first_tensor((*args, *kwargs.values()))
        if tensor is not None:
            self._note(Site(name, "input", f"{name}:input"), module, tensor)

    def _after(self, name: str, module: nn.Module, output: Any) -> None:
        for at, tensor in tensors_in(output):
            self._note(Site(name, at, None if at == "output" else f"{name}:{at}"), module, tensor)

    def _note(self, site: Site, module: nn.Module, tensor: Tensor) -> None:
        if site in self.seen:
            self.seen[site].calls += 1
            return
        owner = self.owners.setdefault((id(tensor), tensor._version), site.key)
        self.alive.append(tensor)
        same_as = None if owner == site.key else owner
        flops = self.counter.get_total_flops()
        self.seen[site] = _Seen(type(module).__name__, flops, tuple(tensor.shape), same_as)

    def table(self) -> SiteTable:
        total = self.counter.get_total_flops()
        rows = [self._row(site, seen, total) for site, seen in self.seen.items()]
        silent = modules_of(self.network).keys() - {site.module for site in self.seen}
        never = [
            SiteRow(Site(name), type(module).__name__)
            for name, module in modules_of(self.network).items()
            if name in silent and not isinstance(module, nn.ModuleList | nn.ModuleDict)
        ]
        return SiteTable((*rows, *never), total)

    def _row(self, site: Site, seen: _Seen, total: int) -> SiteRow:
        has_rows = seen.shape[:1] == (1,)
        shape = seen.shape[1:] if has_rows else seen.shape
        axes, grid, num_text = _read(shape, self.size, self.num_text) if has_rows else ("", None, 0)
        sizes = dict(zip(axes.split(), shape, strict=True)) if axes else {}
        channels = sizes["channels"] * sizes.get("heads", 1) if axes else None
        cost = seen.flops / max(total, 1)
        return SiteRow(
            site, seen.kind, shape, axes, channels, grid, num_text, seen.calls, seen.flops, cost, seen.same_as
        )


def _read(shape: Sequence[int], size: tuple[int, int], num_text: int) -> tuple[Axes, tuple[int, int] | None, int]:
    """Returns axes, grid and number of text tokens of a tensor from its shape."""
    if len(shape) == 1:
        return "channels", None, 0
    if len(shape) == 3 and grid_of(size, math.prod(shape[1:])) == tuple(shape[1:]):
        return "channels height width", (shape[1], shape[2]), 0
    found: list[tuple[int, Axes, tuple[int, int] | None, int]] = []
    for axes in _SEQUENCES.get(len(shape), ()):
        count = shape[axes.split().index("tokens")]
        if num_text and count == num_text:
            found.append((count, axes, None, num_text))
        for text in (0, num_text):
            if grid := grid_of(size, count - text):
                found.append((count, axes, grid, text))
    # There are fewer heads than tokens; of two readings of one length, the first counts.
    return max(found, key=lambda reading: reading[0], default=(0, "", None, 0))[1:]


_SEQUENCES: dict[int, tuple[Axes, ...]] = {
    2: ("tokens channels",),
    3: ("heads tokens channels", "tokens heads channels"),
}
