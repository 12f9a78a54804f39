"""Pictures and masks as a model sees them: upright, cropped to their central square, resized, and encoded once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from diffcore.batching import InBatches
from diffcore.data import UnreadableFileError, resize
from diffcore.data.decode import flattened
from diffcore.errors import IncompatibleModelError, UserError, printable
from diffcore.models import DiffusionModel
from diffcore.models.backbones import condition_keys
from diffcore.models.codec import LatentCodec

_SLACK = 0.02  # relative difference of the aspect ratios of a picture and a mask of another resolution


@dataclass(frozen=True, eq=False)
class Framed:
    """Pictures of one size, with the places of each that count.

    Attributes:
        pixels: 8-bit pixels of the central squares.
        mask: Weights in [0, 1] of the places of x0; None counts all alike.
    """

    pixels: UInt8[Tensor, "k c side side"]
    mask: Float[Tensor, "k 1 h w"] | None = None

    def __len__(self) -> int:
        return len(self.pixels)


def picture_format(model: DiffusionModel, size: int | None = None) -> tuple[int, int]:
    """Returns the number of channels and the side in pixels of the pictures that a model is trained on.

    Args:
        model: Model of any family, whose codec encodes pictures.
        size: Side of the pictures in pixels; by default what the model was trained for.

    Raises:
        UserError: The autoencoder cannot encode this size.
        IncompatibleModelError: The model takes neither grey nor colour pictures.

    Example:
        >>> from diffcore.testing import tiny
        >>> picture_format(tiny.model("sd15")), picture_format(tiny.model("sd15"), size=32)
        ((3, 16), (3, 32))
    """
    factor = getattr(model.codec, "factor", 1)
    vae: Any = model.codec.vae if isinstance(model.codec, LatentCodec) else None
    channels = model.shape[0] if vae is None else int(vae.config["in_channels"])
    if channels not in (1, 3):
        raise IncompatibleModelError(f"{printable(model.name)} takes pictures of {channels} channels, not of 1 or 3")
    side = model.shape[1] * factor if size is None else size
    if side < factor or side % factor:
        raise UserError(f"`size` is {side}; give a multiple of {factor}")
    return channels, side


def framed(
    model: DiffusionModel,
    pictures: Sequence[Image.Image],
    masks: Sequence[Image.Image] | None = None,
    *,
    size: int | None = None,
) -> Framed:
    """Returns pictures as a model sees them, each cropped and resized together with its mask.

    Args:
        model: Model that shall see the pictures.
        pictures: Pictures in any mode and size; EXIF rotations are undone, and transparency lies on white.
        masks: One mask for each picture, bright where places count; of masks with an alpha channel, that channel.
        size: Side in pixels; by default what the model was trained for.

    Raises:
        UserError: There are no pictures, not as many masks, a mask is empty or has other proportions than its picture,
            or the range of a picture's numbers is not known.

    Example:
        >>> from diffcore.testing import tiny
        >>> shown = framed(tiny.model("sd15"), [Image.new("L", (40, 20), 128)])
        >>> tuple(shown.pixels.shape), shown.mask is None
        ((1, 3, 16, 16), True)
    """
    if not pictures:
        raise UserError("there are no `pictures`; give at least one")
    if masks is not None and len(masks) != len(pictures):
        raise UserError(f"there are {len(masks)} masks for {len(pictures)} `pictures`; give one for each")
    channels, side = picture_format(model, size)
    pixels, places = [], []
    cells = model.shape_at(size)[1]
    for number, picture in enumerate(pictures):
        try:
            flat = flattened(picture).convert("RGB" if channels == 3 else "L")
        except UnreadableFileError as error:
            raise UserError(f"picture {number} {error}") from None
        array = np.array(flat)
        pixels.append(resize(torch.from_numpy(array).view(*array.shape[:2], -1).permute(2, 0, 1), side))
        if masks is not None:
            places.append(mask_cells(masks[number], flat.size, cells, f"the mask of picture {number}"))
    return Framed(torch.stack(pixels), torch.stack(places) if masks is not None else None)


def mask_cells(mask: Image.Image, size: tuple[int, int], cells: int, name: str = "the mask") -> Float[Tensor, "1 h w"]:
    """Returns the weights of the cells of x0: the mean of a mask over each cell of the picture's central square.

    Args:
        mask: Mask in any mode; of masks with an alpha channel that is not the same everywhere, that channel.
        size: Width and height of the upright picture in pixels.
        cells: Side of x0 in cells.
        name: Name of the mask in messages.

    Raises:
        UserError: The mask has other proportions than the picture, or marks nothing of its central square.

    Example:
        >>> half = Image.new("L", (4, 4)); half.paste(255, (0, 0, 2, 4))
        >>> mask_cells(half, (8, 8), 2)[0].tolist()
        [[1.0, 0.0], [1.0, 0.0]]
    """
    upright = ImageOps.exif_transpose(mask)
    weights = flattened(upright).convert("L")
    if upright.has_transparency_data:
        alpha = upright.convert("RGBA").getchannel("A")
        if len(set(alpha.getextrema())) > 1:
            weights = alpha
    (width, height), (mask_width, mask_height) = size, weights.size
    if abs(width * mask_height / (height * mask_width) - 1) > _SLACK:
        raise UserError(
            f"{name} has {mask_width} x {mask_height} pixels and its picture {width} x {height}, which are other "
            "proportions; make the mask on the whole picture"
        )
    values = torch.from_numpy(np.array(weights)).float()[None] / 255
    side = min(values.shape[1:])
    top, left = ((edge - side) // 2 for edge in values.shape[1:])
    square = values[:, top : top + side, left : left + side]
    found = F.interpolate(square[None], size=(cells, cells), mode="area")[0]
    if not bool(found.any()):
        raise UserError(
            f"{name} marks nothing of the picture's central square; paint what counts white, the rest black"
        )
    return found.clamp(0, 1)


@torch.no_grad()
def posterior(
    model: DiffusionModel, pixels: UInt8[Tensor, "k c side side"], *, batch_size: int = 8
) -> Float[Tensor, "k 2 *data"]:
    """Returns mean and standard deviation of the x0 of each picture, in float32 on the CPU.

    Args:
        model: Model whose codec encodes the pictures.
        pixels: 8-bit pixels of the pictures.
        batch_size: Number of pictures that are encoded together; halved where memory runs out.

    Raises:
        IncompatibleModelError: The model came without its autoencoder.
    """

    def encoded(rows: Tensor) -> Tensor:
        return torch.stack(model.codec.posterior(rows.to(model.device).float() / 255), 1).float().cpu()

    return torch.cat(list(InBatches(batch_size)(pixels, encoded)))


def condition_of(
    model: DiffusionModel,
    *,
    prompt: str | None = None,
    class_labels: Sequence[int] | None = None,
    size: int | None = None,
) -> dict[str, Tensor]:
    """Returns the condition that a model is given with the pictures of a subject.

    Args:
        model: Model of any family.
        prompt: Text that stands for the subject, for models that take prompts.
        class_labels: Number of the class of each picture, or one for all, for models that take classes.
        size: Side of the pictures in pixels, which some families are conditioned on.

    Raises:
        UserError: What the model takes is missing, what it does not take is given, or there is no such class.
        IncompatibleModelError: The model came without its text encoders.

    Example:
        >>> from diffcore.testing import tiny
        >>> condition_of(tiny.model("dit"), class_labels=[3])["class_labels"].tolist()
        [3]
    """
    name, found = printable(model.name), dict[str, Tensor]()
    required = condition_keys(model.backbone).required
    if model.prompts is not None:
        if prompt is None:
            raise UserError(f"{name} takes a `prompt`; give the text that stands for the subject")
        found |= model.prompts([prompt], size=None if size is None else (size, size))
    elif prompt is not None:
        raise UserError(f"{name} takes no prompts, or came without its text encoders; leave out `prompt`")
    elif set(required) - {"class_labels"}:
        raise IncompatibleModelError(f"{name} came without its text encoders; give its pipeline folder")
    if "class_labels" in required:
        if not class_labels:
            raise UserError(f"{name} draws classes; give the number of the class with `class_label`")
        count, told = num_classes(model), list(class_labels)
        if wrong := [label for label in told if not 0 <= label < count]:
            raise UserError(f"`class_label` is {wrong[0]}; {name} has the classes 0 to {count - 1}")
        found["class_labels"] = torch.tensor(told)
    elif class_labels:
        raise UserError(f"{name} takes no classes; leave out `class_label`")
    return {key: value.cpu() for key, value in found.items()}


def takes_classes(model: DiffusionModel) -> bool:
    """Returns whether a model is told the class of what it draws.

    Args:
        model: Model of any family.
    """
    return "class_labels" in condition_keys(model.backbone).required


def num_classes(model: DiffusionModel) -> int:
    """Returns the number of classes that a class-conditional model draws.

    Args:
        model: Model that takes classes.
    """
    config: Mapping[str, Any] = model.backbone.config  # pyright: ignore[reportAssignmentType]
    return int(config.get("num_class_embeds") or config.get("num_embeds_ada_norm") or 0)
