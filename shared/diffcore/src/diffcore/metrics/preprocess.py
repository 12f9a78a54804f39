"""Preprocessing of images for a feature extractor: antialiased resizing, cropping and normalising, on the device.

Resizing in float with an antialiased filter is what PIL does to a float channel, and what clean-fid showed to matter:
without it an image half the size is off by as much as 169 of 255 levels.

References:
    Parmar et al. 2022, section 3.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

_FILTERS: dict[Any, Literal["bilinear", "bicubic"]] = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
_LARGEST_SIDE = 4096
_STEPS = ("do_resize", "do_rescale", "do_normalize", "do_center_crop", "do_convert_rgb")
_OTHERWISE = ("crop_pct", "size_divisor", "pad_size")  # of other processors, each with its own geometry


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing that a network was trained with, called with images in [0, 1].

    Attributes:
        size: Height and width, or the shorter side, which keeps the proportions.
        crop: Height and width of the central crop; None keeps all.
        mean: Mean that is subtracted from each channel.
        std: Standard deviation that each channel is divided by.
        filter: Interpolation filter of the resizing.
    """

    size: int | tuple[int, int]
    crop: tuple[int, int] | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    filter: Literal["bilinear", "bicubic"] = "bicubic"

    def __call__(self, images: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b 3 out_height out_width"]:
        """Returns the network's input; the filter's overshoot beyond [0, 1] is cut off."""
        x = resize(images, self._target(*images.shape[-2:]), self.filter).clamp(0, 1)
        if self.crop is not None:
            top, left = ((have - want) // 2 for have, want in zip(x.shape[-2:], self.crop, strict=True))
            x = x[..., top : top + self.crop[0], left : left + self.crop[1]]
        return (x - x.new_tensor(self.mean).view(3, 1, 1)) / x.new_tensor(self.std).view(3, 1, 1)

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if isinstance(self.size, tuple):
            return self.size
        short = min(height, width)
        return self.size * height // short, self.size * width // short


# clean-fid: 299 x 299 whatever the proportions, then (255 x - 128) / 128.
INCEPTION = Preprocessing((299, 299), None, (128 / 255, 128 / 255, 128 / 255), (128 / 255, 128 / 255, 128 / 255))
# Pizzi et al. 2022: the shorter side to 288, ImageNet's mean and deviation.
SSCD = Preprocessing(288, None, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear")


def resize(
    images: Float[Tensor, "b c height width"],
    size: tuple[int, int],
    filter: Literal["bilinear", "bicubic"] = "bicubic",
) -> Float[Tensor, "b c out_height out_width"]:
    """Returns images of another size, as PIL resizes a float channel; bicubic may overshoot the range."""
    return functional.interpolate(images, size, mode=filter, antialias=True, align_corners=False)


def preprocessing_from(config: Mapping[str, Any]) -> Preprocessing:
    """Returns the preprocessing that the settings of a transformers image processor describe; null means absent.

    Raises:
        ValueError: A setting is missing, out of range, or not one that we follow.
    """
    config = {key: value for key, value in config.items() if value is not None}
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if config.get(step, True) is not True:
            raise ValueError(f"sets {step} to {config[step]!r}; images must be resized, rescaled and normalised")
    other = [key for key, value in config.items() if key in _OTHERWISE or (key[:3] == "do_" and key not in _STEPS)]
    if other := [key for key in other if config[key] is not False]:
        raise ValueError(f"sets {other[0]}, which is not supported")
    factor = config.get("rescale_factor", 1 / 255)
    if not isinstance(factor, int | float) or abs(255 * factor - 1) > 1e-6:
        raise ValueError(f"has a rescale_factor of {factor!r}; 1/255 is supported")
    filter = _FILTERS.get(config.get("resample", 3))
    if filter is None:
        raise ValueError(f"asks for the filter {config['resample']!r}; 2 (bilinear) and 3 (bicubic) are supported")
    crop = _sides(config.get("crop_size", 224)) if config.get("do_center_crop", "crop_size" in config) else None
    size = config.get("size", 224)
    if isinstance(size, dict):
        size = {key: side for key, side in size.items() if side is not None}
        if size.keys() not in ({"shortest_edge"}, {"height", "width"}):
            raise ValueError(f"gives the size {size!r}; shortest_edge, or height and width, are supported")
        size = size.get("shortest_edge", size)
        chosen = _sides(size) if isinstance(size, dict) else _side(size)
    else:
        chosen = _sides(size) if crop is None else _side(size)
    least = (chosen, chosen) if isinstance(chosen, int) else chosen
    if crop is not None and (crop[0] > least[0] or crop[1] > least[1]):
        raise ValueError(f"crops {crop} out of {least}")
    return Preprocessing(chosen, crop, _channels(config, "image_mean"), _channels(config, "image_std"), filter)


def _sides(value: Any) -> tuple[int, int]:
    if isinstance(value, dict):
        return _side(value.get("height")), _side(value.get("width"))
    return _side(value), _side(value)


def _side(value: Any) -> int:
    if not isinstance(value, int) or not 0 < value <= _LARGEST_SIDE:
        raise ValueError(f"gives a side of {value!r}; it must be a number of pixels up to {_LARGEST_SIDE}")
    return value


def _channels(config: Mapping[str, Any], key: str) -> tuple[float, float, float]:
    values = config.get(key)
    if not isinstance(values, list) or len(values) != 3 or not all(isinstance(v, int | float) for v in values):
        raise ValueError(f"has no {key} for three channels")
    if key == "image_std" and min(values) <= 0:
        raise ValueError(f"has an image_std of {values}")
    first, second, third = map(float, values)
    return first, second, third
