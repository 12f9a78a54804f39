"""Pictures that lie beside adapters, as web UIs and sharing sites keep them: NAME.png or NAME.preview.png."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffcore.data.decode import decode
from diffcore.data.files import UnreadableFileError
from diffcore.errors import UserError
from diffcore.io import files
from w2w_space.files.population import Member

_ENDINGS = (".preview.png", ".png", ".preview.jpg", ".jpg", ".jpeg", ".webp")
_PIXELS = 50_000_000
_SIDE = 64


def previews(members: Sequence[Member]) -> dict[str, Tensor]:
    """Returns a small picture in [0, 1] of each member that has one beside its file, by the member's name.

    What cannot be read as a picture counts as none: a population is never worth less for it.

    Args:
        members: Members of a population, with the paths that they were read from.
    """
    found = {}
    for member in members:
        if member.source and (picture := _beside(Path(member.source))) is not None:
            found[member.name] = picture
    return found


def _beside(source: Path) -> Tensor | None:
    stem = source.name.removesuffix(".safetensors")
    for ending in _ENDINGS:
        path = source.with_name(stem + ending)
        try:
            if not path.is_file():
                continue
            image = decode(files.read(path), max_pixels=_PIXELS).pixels
        except (UserError, UnreadableFileError, OSError):
            continue
        scaled = torch.as_tensor(image)[None].float() / 255
        side = max(scaled.shape[-2:])
        if side > _SIDE:
            sides = [max(1, round(_SIDE * s / side)) for s in scaled.shape[-2:]]
            scaled = torch.nn.functional.interpolate(scaled, sides, mode="bilinear", antialias=True)
        return scaled[0].clamp(0, 1)
    return None
