"""Sheets of images to look at: samples of each generative model, and data of each classifier."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch
from jaxtyping import Float
from matplotlib import colormaps
from torch import Tensor
from torch.nn import functional as F

from diffcore.models import generate, load
from diffcore.noise import row_noise
from diffcore.runtime import Runtime
from diffcore.zoo.digits.data import STYLES, load_digits, render
from diffcore.zoo.portraits.attributes import PARTS
from diffcore.zoo.portraits.captions import describe
from diffcore.zoo.portraits.draw import draw
from diffcore.zoo.portraits.gates import draw_samples
from diffcore.zoo.portraits.people import select
from diffcore.zoo.portraits.pictures import held_out_pictures
from diffcore.zoo.portraits.planted import planted, verbatim_people
from diffcore.zoo.truth import identities, keypoints, masks

Sheet = tuple[Float[Tensor, "n c h w"], int, str]
"""Images, how many stand in a row, and what one sees."""

_DOT = torch.tensor([0.0, 1.0, 1.0]).view(3, 1, 1)  # cyan: nobody wears it


def samples(name: str, folder: Path, runtime: Runtime) -> Sheet:
    """Returns a sheet of generated images, or of the data for models that generate none."""
    return _SHEETS[name](folder, runtime)


def _drawn(folder: Path, runtime: Runtime) -> Sheet:
    people, points = keypoints(10, size=64)
    _, parts = masks(10, size=64)
    painted = torch.tensor(colormaps["tab20"](range(len(PARTS))))[:, :3].float()[parts.long()].movedim(-1, 1)
    person, point = points.visible.nonzero(as_tuple=True)
    x, y = points.positions[person, point].round().long().unbind(-1)
    dots = torch.zeros(10, 1, 64, 64)
    dots[person, 0, y, x] = 1
    dotted = torch.where(F.max_pool2d(dots, 3, 1, 1) > 0, _DOT, people.images)
    same, _ = identities(2, 10, size=64)
    what = "ten strangers, the parts of their pictures, their visible key points, and two persons ten times"
    return torch.cat([people.images, painted, dotted, same.images]), 10, what


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
    labels, noise = torch.arange(50) % 10, row_noise(0, range(50), model.shape).unsqueeze(1)
    images = generate(model, labels=labels, seeds=[0], noise=noise, steps=20, clip_x0=1.2)
    return images.flatten(0, 1), 10, "five samples of each digit"


def _handwritten(folder: Path, runtime: Runtime) -> Sheet:
    return _first_of_each(5).flatten(0, 1), 10, "five handwritten digits of each class"


def _styled(folder: Path, runtime: Runtime) -> Sheet:
    changes = torch.linspace(-1, 1, 10).view(1, 10, 1) * torch.eye(len(STYLES)).unsqueeze(1)
    digits = _first_of_each(len(STYLES))
    images = render(digits.flatten(0, 1), changes.flatten(0, 1))
    return (images + 1) / 2, 10, f"one number of the style a row, from -1 to 1: {', '.join(STYLES)}"


def _first_of_each(count: int) -> Float[Tensor, "count 10 1 8 8"]:
    images, labels = load_digits()
    return torch.stack([images[labels == digit][:count] for digit in range(10)], dim=1)


_SHEETS: Final[Mapping[str, Callable[[Path, Runtime], Sheet]]] = MappingProxyType(
    {
        "portraits-oracle": _drawn,
        "portraits-sd": _ordinary,
        "portraits-sd-memorised": _memorised,
        "portraits-sd-planted": _memorised,
        "digits8-classifier": _handwritten,
        "digits8-edm": _digits,
        "digits-styles-oracle": _styled,
        "digits-styles": _digits,
    }
)
