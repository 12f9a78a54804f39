"""Plans of noise on disk: a safetensors file with the order of the samples and a seed for each visit."""

import warnings
from pathlib import Path

import torch

from .plan import NoisePlan

_FORMAT = "immiscible-noise plan 1"


def write_plan(plan: NoisePlan, path: Path | str) -> Path:
    """Writes a plan, and returns the file.

    Args:
        plan: Plan that is written.
        path: Name of the safetensors file.

    Example:
        >>> import tempfile
        >>> plan = NoisePlan.build(torch.randn(20, 4, 8, 8), window=10)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = read_plan(write_plan(plan, Path(folder) / "plan.safetensors"))
        >>> bool((found.seeds == plan.seeds).all())
        True
    """
    from safetensors.torch import save_file

    told = {"format": _FORMAT, "window": str(plan.window), "torch_version": plan.torch_version}
    save_file({"order": plan.order, "seeds": plan.seeds}, str(path), metadata=told)
    return Path(path)


def read_plan(path: Path | str) -> NoisePlan:
    """Reads a plan; warns if another version of torch made its noises.

    Args:
        path: File that `write_plan` wrote.

    Raises:
        ValueError: The file holds no plan.
    """
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        told = file.metadata() or {}
        if told.get("format") != _FORMAT:
            raise ValueError(f"{path} holds no plan; give a file that `write_plan` wrote")
        order, seeds = file.get_tensor("order"), file.get_tensor("seeds")
    if told["torch_version"] != torch.__version__:
        warnings.warn(
            f"the plan's noises were made with torch {told['torch_version']}, this is {torch.__version__}, which may "
            "make others from the same seeds; build the plan anew if the training has not begun",
            stacklevel=2,
        )
    return NoisePlan(order, seeds, int(told["window"]), told["torch_version"])
