"""The runtime of a computation: device, precision, seed, processes, threads. Imports no torch.

Batch sizes are not here: a row of Stable Diffusion and an 8x8 digit want different ones, so each command has its own.
"""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cyclopts import Parameter

from diffcore.errors import MissingDependencyError, UserError

if TYPE_CHECKING:
    import torch
    from lightning.fabric import Fabric

_PRECISION = {"float32": "32-true", "bfloat16": "bf16-true", "float16": "16-true"}


@Parameter(name="*", group="Runtime")
@dataclass(frozen=True)
class Runtime:
    """Device, precision, batch size, seed and processes of a computation; also a group of command line options.

    Attributes:
        device: Device to compute on; auto takes an accelerator if there is one.
        dtype: Precision of the networks; float16 needs an accelerator.
        seed: Seed of all random draws, which depend on it and the row's index alone.
        devices: Number of processes per machine, one accelerator each.
        num_nodes: Number of machines that work together.
        strategy: Lightning's name of the way in which processes work together.
        threads: Number of CPU threads; by default as many as there are cores, at most 8.
    """

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    seed: int = 0
    devices: int = 1
    num_nodes: int = 1
    strategy: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("devices", "num_nodes", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"`{name}` is {value}; give a number of at least 1")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"`seed` is {self.seed}; give a number from 0 to 2^63 - 1")
        if self.device == "cpu":
            _refuse_half_on_cpu(self.dtype)

    @property
    def torch_device(self) -> "torch.device":
        """The device that `device` stands for on this machine.

        Raises:
            UserError: The device asked for is not here.
        """
        import torch

        present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        name = next(name for name, here in present.items() if here) if self.device == "auto" else self.device
        if not present[name]:
            raise UserError(f"torch sees no '{name}' device on this machine; try `device` auto")
        return torch.device(name)

    @property
    def torch_dtype(self) -> "torch.dtype":
        """The precision as torch's dtype.

        Raises:
            UserError: float16 on a CPU, where most operations are missing or slower than float32.
        """
        import torch

        if self.torch_device.type == "cpu":
            _refuse_half_on_cpu(self.dtype)
        return getattr(torch, self.dtype)

    def generator(self, row: int, stream: int = 0) -> "torch.Generator":
        """Returns the CPU generator of one row, the same whatever the batch size or the number of processes.

        Args:
            row: Index of the row in the whole computation, not in its batch.
            stream: Number that keeps draws for different purposes apart.
        """
        from diffcore.noise import row_generator

        return row_generator(self.seed, row, stream)

    def fabric(self) -> "Fabric":
        """Returns Lightning Fabric for this runtime, not launched yet.

        Raises:
            MissingDependencyError: Lightning is not installed.
        """
        try:
            from lightning.fabric import Fabric
        except ImportError as error:
            raise MissingDependencyError("Lightning is not installed; pip install 'diffcore[train]'") from error
        _ = self.torch_dtype  # refuses what the device cannot do before any process starts
        return Fabric(
            accelerator=self.torch_device.type,
            devices=self.devices,
            num_nodes=self.num_nodes,
            strategy=self.strategy,
            precision=_PRECISION[self.dtype],  # pyright: ignore[reportArgumentType]
        )

    def launched(self) -> "Fabric | None":
        """Returns the processes that share the work, launched; None where there is only one."""
        if self.devices * self.num_nodes == 1:
            return None
        fabric = self.fabric()
        fabric.launch()
        return fabric

    def apply_threads(self) -> None:
        """Tells torch how many threads to use; call before its first operation."""
        import torch

        torch.set_num_threads(self.threads or default_threads())


def default_threads() -> int:
    """Returns the default number of CPU threads: the cores this process may use, 8 at most, 1 in a test."""
    if "PYTEST_VERSION" in os.environ:
        return 1
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return max(int(os.environ["OMP_NUM_THREADS"]), 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8)


def _refuse_half_on_cpu(dtype: str) -> None:
    if dtype == "float16":
        raise UserError("float16 does not run on a CPU; use `dtype` bfloat16 or float32")
