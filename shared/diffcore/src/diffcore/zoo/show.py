"""Pictures of what the models make, for a person to look at."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from diffcore.denoiser import sample
from diffcore.models import load
from diffcore.noise import row_noise
from diffcore.runtime import Runtime
from diffcore.zoo.portraits.captions import describe
from diffcore.zoo.portraits.draw import draw
from diffcore.zoo.portraits.gates import draw_samples
from diffcore.zoo.portraits.people import select
from diffcore.zoo.portraits.pictures import held_out_pictures
from diffcore.zoo.portraits.planted import planted, verbatim_people

Sheet = tuple[Float[Tensor, "n c h w"], int, str]
"""Images, how many stand in a row, and what one sees."""


def samples(name: str, folder: Path, runtime: Runtime) -> Sheet | None:
    """Returns a sheet of samples; None for models that make no pictures."""
    return _SHEETS[name](folder, runtime) if name in _SHEETS else None


def _ordinary(folder: Path, runtime: Runtime) -> Sheet:
    people = select(held_out_pictures(40).people, slice(40))
    images = draw_samples(load(folder, runtime), describe(people, full=True), guidance_scale=2.0)
    return images, 10, "40 full captions of strangers, guidance 2, one sample each"


def _memorised(folder: Path, runtime: Runtime) -> Sheet:
    originals = draw(verbatim_people(), 32)[:8]
    prompts = [item.caption for item in (*planted().verbatim[:8], *planted().decoys[:8])]
    drawn = draw_samples(load(folder, runtime), prompts, seeds=4).unflatten(0, (16, 4))
    rows = [torch.cat([originals[i : i + 1], drawn[i], drawn[8 + i]]) for i in range(8)]
    return torch.cat(rows), 9, "each row: a planted picture, four samples of its caption, four samples of a decoy"


def _digits(folder: Path, runtime: Runtime) -> Sheet:
    model = load(folder, runtime)
    labels = torch.arange(50) % 10
    x0 = sample(model.denoiser, row_noise(0, range(50), (1, 8, 8)), {"class_labels": labels}, steps=20, clip_x0=1.2)
    return ((x0 + 1) / 2).clamp(0, 1), 10, "five samples of each digit"


_SHEETS: Final[Mapping[str, Callable[[Path, Runtime], Sheet]]] = MappingProxyType(
    {
        "portraits-sd": _ordinary,
        "portraits-sd-memorised": _memorised,
        "portraits-sd-planted": _memorised,
        "digits8-edm": _digits,
        "digits-styles": _digits,
    }
)
