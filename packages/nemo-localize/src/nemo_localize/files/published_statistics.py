"""Statistics that the published code saved: the captions behind its own are not public, so the file is all there is.

References:
    Code of Hintersdorf, Struppek et al. 2024: a tuple of two lists, mean and standard deviation, with one tensor per
    value layer, shallowest first; or one list of tensors with a row per caption.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffcore.errors import CorruptArtifactError, IncompatibleModelError, UserError, printable
from diffcore.io import files
from diffcore.models import DiffusionModel
from nemo_localize.activations import text_fingerprint
from nemo_localize.sites import ValueSites, value_sites
from nemo_localize.statistics import Statistics

PUBLISHED_CAPTIONS = 50_000


def import_statistics(
    model: DiffusionModel, path: Path, *, num_prompts: int = PUBLISHED_CAPTIONS, up: bool = False
) -> Statistics:
    """Returns the statistics that the published code saved; the file does not say of which model they are.

    The file is a pickle; torch's restricted unpickler reads tensors from it and runs none of its code.

    Args:
        model: Model that the statistics belong to.
        path: File `.pt` that the published code saved.
        num_prompts: Number of prompts behind them where the file has no row per prompt; their weight when they are
            merged.
        up: Whether they include the up blocks.

    Raises:
        CorruptArtifactError: The file holds something else.
        IncompatibleModelError: Layers or their widths are not the model's.
        UserError: There is no such file, or the number of captions makes no sense.
    """
    if num_prompts < 2:
        raise UserError(f"`import_count` is {num_prompts}; a standard deviation is of at least 2 captions")
    if not path.is_file():
        raise UserError(f"{printable(path, 300)} does not exist; give the .pt file that the published code saved")
    sites = value_sites(model.backbone, up=up)
    count, mean, sd = _moments(path, _read(path), sites, num_prompts)
    return Statistics(
        num_prompts=count,
        mean=mean,
        var=sd.square(),
        fingerprint=text_fingerprint(model, sites),
        sources=((path.name, count),),
        mean_length=0.0,
        vocabulary=frozenset(),
    )


def _read(path: Path) -> Any:
    with files.explained(path, reading=True):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
            raise CorruptArtifactError(
                f"{printable(path, 300)} is no file of tensors alone ({printable(error)}); give the .pt file that the "
                "published code saved"
            ) from error


def _moments(path: Path, found: Any, sites: ValueSites, num_prompts: int) -> tuple[int, Tensor, Tensor]:
    """Returns number of captions, mean and standard deviation of every neuron."""
    if isinstance(found, tuple | list) and len(found) == 2 and all(isinstance(part, tuple | list) for part in found):
        mean, sd = (_joined(path, part, sites, 1) for part in found)
    else:
        rows = _joined(path, found, sites, 2)
        if len(rows) < 2:
            raise UserError(f"{printable(path, 300)} is of {len(rows)} captions; give statistics of at least 2")
        num_prompts, mean, sd = len(rows), rows.mean(0), rows.std(0)
    if not bool(torch.isfinite(mean).all() and torch.isfinite(sd).all() and (sd >= 0).all() and (mean >= 0).all()):
        raise CorruptArtifactError(
            f"{printable(path, 300)} holds negative numbers, NaN or infinity; statistics of absolute values have none"
        )
    return num_prompts, mean, sd


def _joined(path: Path, layers: Any, sites: ValueSites, dims: int) -> Tensor:
    """Returns the layers' tensors side by side, in float64."""
    where = printable(path, 300)
    if not isinstance(layers, tuple | list) or not all(
        isinstance(layer, Tensor) and layer.ndim == dims and layer.is_floating_point() for layer in layers
    ):
        raise CorruptArtifactError(
            f"{where} holds no statistics of value neurons: expected lists of one tensor per value layer, their means "
            "and standard deviations, or their activations"
        )
    widths = tuple(layer.shape[-1] for layer in layers)
    if widths != sites.widths:
        raise IncompatibleModelError(
            f"{where} is of value layers of widths {list(widths)}, where this model has {list(sites.widths)}; import "
            "it for its own model"
        )
    if len({len(layer) for layer in layers}) > 1 and dims > 1:
        raise CorruptArtifactError(f"{where} has other numbers of captions in other layers; save it again")
    return torch.cat([layer.double() for layer in layers], -1)
