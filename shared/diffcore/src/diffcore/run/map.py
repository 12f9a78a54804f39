"""A map over items that keeps what is finished in a run, and shares the rest between processes."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from diffcore.digests import digest_of
from diffcore.run.run import Run
from diffcore.units import R, T, in_order, units_of

if TYPE_CHECKING:
    from lightning.fabric import Fabric


class RunMap:
    """Goes through items as `diffcore.units.each_unit` does, keeps finished units in a run, and computes none twice.

    Every process computes its share of what is missing and reads what the others wrote, so that all return the same.

    Args:
        run: Run folder, opened by all processes.
        fabric: Launched processes that share the units; None for a single one.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import mkdtemp
        >>> import torch
        >>> def squares(unit: list[int]) -> list[torch.Tensor]:
        ...     return [torch.tensor(n * n) for n in unit]
        >>> with Run.open(Path(mkdtemp()) / "run", command="demo run", config={}) as run:
        ...     [int(square) for square in RunMap(run)(squares, [2, 3], name="squares", kind=torch.Tensor)]
        [4, 9]
    """

    def __init__(self, run: Run, fabric: "Fabric | None" = None) -> None:
        self.run = run
        self._fabric = fabric

    @property
    def leading(self) -> bool:
        """Whether this process writes results: the only one, or the first of several."""
        return self.run.leading

    def __call__(
        self, work: Callable[[list[T]], list[R]], items: Sequence[T], *, name: str, kind: type[R], unit_size: int = 1
    ) -> list[R]:
        """Returns one result per item, in order; see `diffcore.units.Map`."""
        fabric = self._fabric
        rank, processes = (0, 1) if fabric is None else (fabric.global_rank, fabric.world_size)
        units = {f"{name}-{digest_of(' '.join(map(digest_of, unit)))}": unit for unit in units_of(items, unit_size)}
        if fabric is not None:
            fabric.barrier()  # the first process opens the run, and deletes what it takes for interrupted writes
        todo = set(self.run.missing(units))
        for key in list(units)[rank::processes]:
            if key in todo:
                self._keep(key, work(units[key]), kind)
        if fabric is not None:
            fabric.barrier()
        return in_order(items, [(unit, self._kept(key, kind)) for key, unit in units.items()])

    def _keep(self, key: str, results: list[Any], kind: type[Any]) -> None:
        if issubclass(kind, Tensor):
            self.run.save(key, {f"{place:05d}": result.contiguous() for place, result in enumerate(results)})
        else:
            self.run.save(key, {}, rows=[result.to_json() for result in results])

    def _kept(self, key: str, kind: type[Any]) -> list[Any]:
        part = self.run.load(key)
        if issubclass(kind, Tensor):
            return [part.tensors[name] for name in sorted(part.tensors)]
        return [kind.from_json(row) for row in part.fields["rows"]]
