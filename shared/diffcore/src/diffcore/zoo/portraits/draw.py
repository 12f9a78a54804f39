"""Images, label maps and key points of people."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from diffcore.zoo.portraits.attributes import BACKGROUNDS, HATS, PARTS, STYLES
from diffcore.zoo.portraits.layers import SHOULDER_X, SHOULDER_Y, Layer, face_of, head_frame, layers, palette
from diffcore.zoo.portraits.people import People, select

_SUPERSAMPLING = 2
# Working sets that stay in the cache: the cost per image doubles with chunks ten times as large.
_PIXELS_PER_CHUNK = 50 * 64 * 64


def draw(people: People, size: int = 64) -> Float[Tensor, "n 3 size size"]:
    """Draws one image per person, values in [0, 1].

    Shapes are composited back to front at twice the side and averaged 2x2. The same person at another size is the same
    image, seen finer or coarser.
    """
    return torch.cat([_draw_chunk(chunk, size) for chunk in _chunks(people, size)])


def draw_masks(people: People, size: int = 64) -> UInt8[Tensor, "n size size"]:
    """Returns the class (index into `attributes.PARTS`) of each pixel.

    The top-most layer that covers more than half of a sub-pixel counts; the four sub-pixels of a pixel vote.
    """
    return torch.cat([_mask_chunk(chunk, size) for chunk in _chunks(people, size)])


@dataclass(frozen=True)
class Keypoints:
    """Positions of `attributes.KEYPOINTS` in images.

    Attributes:
        positions: Coordinates x and y in pixels; (0, 0) is the middle of the top left pixel.
        visible: Whether a point lies inside the image and is not hidden by hair or hat; glasses do not hide eyes.
    """

    positions: Float[Tensor, "n 13 2"]
    visible: Bool[Tensor, "n 13"]


def keypoints(people: People, size: int = 64) -> Keypoints:
    """Returns the key points of each person's image in closed form; nothing is drawn."""
    face = face_of(people)
    zero = torch.zeros(len(people["gender"]))
    a, b, turn, gap = (value.flatten() for value in (face.half_width, face.half_height, face.turn, face.eye_gap))
    mouth, corner_y = face.mouth_half_width.flatten(), (face.mouth_y - 0.5 * face.mouth_curve).flatten()
    eye_y = zero + face.eye_y
    points = (
        (turn - gap, eye_y),
        (turn + gap, eye_y),
        (1.25 * turn, face.nose_y.flatten()),
        (turn - mouth, corner_y),
        (turn + mouth, corner_y),
        (zero, b),
        (-a - 0.01, zero + 0.02),
        (a + 0.01, zero + 0.02),
        (zero, face.top.flatten()),
        (turn - gap, eye_y - 0.122),
        (turn + gap, eye_y - 0.122),
        (zero - SHOULDER_X, zero + SHOULDER_Y),
        (zero + SHOULDER_X, zero + SHOULDER_Y),
    )
    x, y = (torch.stack(values, dim=1) for values in zip(*points, strict=True))
    cos, sin = torch.cos(people["roll"]).unsqueeze(1), torch.sin(people["roll"]).unsqueeze(1)
    scale = people["scale"].unsqueeze(1)
    picture_x = (cos * x - sin * y) * scale + people["shift_x"].unsqueeze(1)
    picture_y = (sin * x + cos * y) * scale + people["shift_y"].unsqueeze(1) + 0.02
    positions = (torch.stack([picture_x, picture_y], dim=-1) + 1) / 2 * size - 0.5
    visible = ((positions >= 0) & (positions <= size - 1)).all(-1)
    covered_ears = (people["style"] == STYLES.index("long")) | (people["style"] == STYLES.index("curly"))
    visible[:, 6:8] &= ~covered_ears.unsqueeze(1)
    visible[:, 8] &= people["hat"] == HATS.index("none")
    return Keypoints(positions, visible)


def _chunks(people: People, size: int) -> list[People]:
    count = len(people["gender"])
    chunk = max(1, _PIXELS_PER_CHUNK // (_SUPERSAMPLING * size) ** 2)
    return [select(people, slice(start, start + chunk)) for start in range(0, count, chunk)] or [people]


def _grid(side: int) -> tuple[Tensor, Tensor]:
    """Returns x and y (1 side side) of the sub-pixels' middles in [-1, 1]."""
    middle = (torch.arange(side) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(middle, middle, indexing="ij")
    return x.unsqueeze(0), y.unsqueeze(0)


def _coverage(layer: Layer, side: int) -> Tensor:
    """Returns the share of each sub-pixel that the layer covers, n h w in [0, 1]."""
    coverage = (0.5 - layer.distance * (side / 2.2)).clamp_(0, 1)
    return coverage if layer.shown is None else coverage * layer.shown.view(-1, 1, 1)


def _draw_chunk(people: People, size: int) -> Tensor:
    side = _SUPERSAMPLING * size
    x, y = _grid(side)
    angle = people["gradient_angle"].view(-1, 1, 1)
    gradient = people["gradient"].view(-1, 1, 1) * (x * torch.cos(angle) + y * torch.sin(angle))
    backdrop = palette(BACKGROUNDS, people["background"]) + people["background_jitter"]
    image = backdrop.view(-1, 3, 1, 1) + gradient.unsqueeze(1)
    for layer in layers(people, *head_frame(people, x, y)):
        image.lerp_(layer.colour, _coverage(layer, side).unsqueeze(1))
    return F.avg_pool2d(image.clamp_(0, 1), _SUPERSAMPLING)


def _mask_chunk(people: People, size: int) -> Tensor:
    side = _SUPERSAMPLING * size
    x, y = _grid(side)
    labels = torch.zeros(len(people["gender"]), side, side, dtype=torch.int64)
    for layer in layers(people, *head_frame(people, x, y)):
        labels[_coverage(layer, side) > 0.5] = PARTS.index(layer.part)
    votes = F.avg_pool2d(F.one_hot(labels, len(PARTS)).movedim(-1, 1).float(), _SUPERSAMPLING)
    return votes.argmax(1).to(torch.uint8)
