"""A written adapter held against its point, through the library that users load it with."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffcore.errors import IncompatibleModelError, MissingDependencyError, printable
from w2w_space.space import Point

if TYPE_CHECKING:
    from diffcore.models import DiffusionModel

_LARGEST = 0.02  # share of the effect that rounding to a narrow type may cost


@dataclass(frozen=True)
class Shown:
    """Outputs of the network with a written adapter, as diffusers loads it, beside those with its point.

    Attributes:
        effect: Root mean square of what the point changes in the network's output.
        error: Root mean square of the difference to what diffusers shows, divided by the effect.
    """

    effect: float
    error: float

    @property
    def equal(self) -> bool:
        """Whether diffusers shows the point, up to rounding."""
        return self.error <= _LARGEST


def shown_by_diffusers(model: "DiffusionModel", point: Point, path: Path | str) -> Shown:
    """Returns how well `load_lora_weights` of plain diffusers shows a point that was written.

    The pipeline of the model is given the adapter, and is as before afterwards.

    Args:
        model: Base model of the space, with its pipeline.
        point: Point that was written.
        path: Adapter in the layout of diffusers or kohya.

    Raises:
        IncompatibleModelError: The model has no pipeline, or the adapter is a folder of PEFT.
        MissingDependencyError: The package peft, which diffusers needs for adapters, is not installed.
    """
    path = Path(path)
    if importlib.util.find_spec("peft") is None:
        raise MissingDependencyError("diffusers reads adapters through peft, which is not installed; pip install peft")
    pipeline = model.pipeline
    if pipeline is None or path.is_dir() or not hasattr(pipeline, "load_lora_weights"):
        raise IncompatibleModelError(
            f"{printable(path, 300)} cannot be shown by a pipeline of diffusers; give a file in the layout of "
            "diffusers or kohya, and a pipeline that takes adapters"
        )
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, *model.shape, generator=generator).to(model.device, model.dtype)
    t = model.denoiser.schedule.timesteps(3)[1:2].to(model.device)
    condition = model.empty_condition(1)

    @torch.no_grad()
    def output(of: "DiffusionModel") -> Tensor:
        return of.denoiser(x, t, condition).output.float()

    before, ours = output(model), output(model.with_adapter(point.adapter()))
    pipeline.load_lora_weights(path.parent, weight_name=path.name)
    try:
        theirs = output(model)
    finally:
        pipeline.unload_lora_weights()
    effect = float((ours - before).square().mean().sqrt())
    return Shown(effect, float((theirs - ours).square().mean().sqrt()) / max(effect, 1e-12))
