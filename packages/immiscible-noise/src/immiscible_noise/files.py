"""What this package keeps on disk: plans of noise, and which solver was the fastest on a machine.

A plan is a safetensors file with the order of the samples and a seed for each visit.
"""

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from .plan import NoisePlan
from .solvers import Thresholds

_FORMAT = "immiscible-noise plan 1"
_TIMED = re.compile(r"solve few of the pairs, against (scipy|lapx|potentials) batch=(\d+) ratio")
_FIELDS = {"scipy": "beside_scipy", "lapx": "beside_lapx", "potentials": "on_device"}


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
        ValueError: The file holds no plan, or is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            told = file.metadata() or {}
            if told.get("format") != _FORMAT:
                raise ValueError(f"{path} holds no plan; give a file that `write_plan` wrote")
            order, seeds = file.get_tensor("order"), file.get_tensor("seeds")
    except SafetensorError as error:
        raise ValueError(
            f"{path} holds no plan, or is damaged ({error}); give a file that `write_plan` wrote"
        ) from error
    if told["torch_version"] != torch.__version__:
        warnings.warn(
            f"the plan's noises were made with torch {told['torch_version']}, this is {torch.__version__}, which may "
            "make others from the same seeds; build the plan anew if the training has not begun",
            stacklevel=2,
        )
    return NoisePlan(order, seeds, int(told["window"]), told["torch_version"])


def read_thresholds(path: Path | str) -> Thresholds:
    """Reads from a benchmark of this machine from how many rows on the sparse solver is the fastest.

    What the benchmark did not time, such as lapx where it is not installed, keeps its default. Where the sparse solver
    was never the fastest, twice the largest batch that was timed is taken.

    Args:
        path: JSON file that the benchmark of this package wrote.

    Raises:
        ValueError: The file holds no times of solvers.

    Example:
        >>> import tempfile
        >>> row = {"name": "solve few of the pairs, against scipy batch=512 ratio", "value": 2.1, "unit": "x"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "bench.json"
        ...     _ = path.write_text(json.dumps([row]))
        ...     read_thresholds(path).beside_scipy
        512
    """
    try:
        ratios = {row["name"]: float(row["value"]) for row in json.loads(Path(path).read_text("utf-8"))}
    except (ValueError, TypeError, KeyError):
        ratios = {}
    timed: dict[str, dict[int, float]] = {}
    for name, ratio in ratios.items():
        if match := _TIMED.fullmatch(name):
            timed.setdefault(match[1], {})[int(match[2])] = ratio
    if not timed:
        raise ValueError(f"{path} holds no times of solvers; give the JSON file of a benchmark of this package")
    found = Thresholds()
    for other, by_rows in timed.items():
        limit = 2 * max(by_rows)
        for rows in sorted(by_rows, reverse=True):
            if by_rows[rows] < 1:
                break
            limit = rows
        found = replace(found, **{_FIELDS[other]: limit})
    return found
