"""The layers of a portrait, from back to front, each a shape with a colour and the part that it belongs to."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffcore.zoo.portraits.attributes import (
    BEARDS,
    EYES,
    GLASSES,
    HAIRS,
    HAT_COLOURS,
    HATS,
    SHIRTS,
    SKINS,
    STYLES,
    Colour,
)
from diffcore.zoo.portraits.people import People
from diffcore.zoo.portraits.shapes import box, ellipse, superellipse

SHOULDER_X = 0.6
SHOULDER_Y = 1.12 - 0.50 * (1 - (SHOULDER_X / 0.82) ** 2) ** 0.5
_WHITE, _FRAME, _MOUTH_HOLE = (0.97, 0.97, 0.97), (0.08, 0.08, 0.10), (0.25, 0.05, 0.08)


@dataclass(frozen=True)
class Layer:
    """One painted shape with its colour.

    Attributes:
        name: The thing that is painted, such as hair.
        part: Name of the part in `attributes.PARTS` that it belongs to.
        distance: Signed distance of each sub-pixel to the shape's edge, n h w.
        colour: Colour of shape n 3 1 1, or one per pixel, n 3 h w.
        shown: Whether each person has the layer, n bools; None means everybody.
    """

    name: str
    part: str
    distance: Tensor
    colour: Tensor
    shown: Tensor | None = None


@dataclass(frozen=True)
class Face:
    """Positions of the parts in the head's frame, in half widths of the image, from which key points follow.

    All are tensors n 1 1. The frame's origin is the middle of the head, y points down. `top` is where head or hair end
    above the origin; a shoulder is the edge of the shirt, `SHOULDER_X` from the middle.
    """

    half_width: Tensor
    half_height: Tensor
    top: Tensor
    turn: Tensor
    eye_gap: Tensor
    eye_y: float
    nose_y: Tensor
    mouth_y: Tensor
    mouth_half_width: Tensor
    mouth_curve: Tensor


def face_of(people: People) -> Face:
    """Returns the proportions of each face."""
    column = _columns(people)
    half_height = 0.50 + 0.045 * column("face_length")
    # Of the ellipses of the hair, those at the back where they are higher.
    tops = {"bald": -half_height, "short": -0.625 - 0.03 * column("face_length"), "long": -0.68, "curly": -0.72}
    top = torch.zeros_like(half_height)
    for style, height in tops.items():
        top = torch.where(column("style") == STYLES.index(style), height, top)
    return Face(
        half_width=0.40 + 0.05 * column("face_width"),
        half_height=half_height,
        top=top,
        turn=0.07 * column("yaw"),
        eye_gap=0.165 + 0.025 * column("eye_gap"),
        eye_y=-0.08,
        nose_y=0.10 + 0.03 * column("nose_length"),
        mouth_y=0.29 + 0.02 * column("nose_length"),
        mouth_half_width=0.175 + 0.045 * column("mouth_width"),
        mouth_curve=0.14 * column("smile"),
    )


def head_frame(people: People, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Returns positions of the image (n h w, in half widths) in the frame of each head: shifted, scaled, rolled."""
    column = _columns(people)
    u = (x - column("shift_x")) / column("scale")
    v = (y - column("shift_y") - 0.02) / column("scale")
    cos, sin = torch.cos(column("roll")), torch.sin(column("roll"))
    return cos * u + sin * v, -sin * u + cos * v


def layers(people: People, x: Tensor, y: Tensor) -> Iterator[Layer]:
    """Yields the layers over the background, from back to front, at head-frame positions `x`, `y` (n h w)."""
    face = face_of(people)
    skin = palette(SKINS, people["skin"]) + people["skin_jitter"]
    hair = palette(HAIRS, people["hair"]) + people["hair_jitter"]
    yield from _back_hair(people, face, hair, x, y)
    yield from _body(people, face, skin, x, y)
    yield from _face(people, face, skin, hair, x, y)
    yield from _mouth(people, face, skin, x, y)
    yield from _nose(people, face, skin, x, y)
    yield from _eyes(people, face, hair, x, y)
    yield from _front_hair(people, face, hair, x, y)
    yield from _glasses(people, face, x, y)
    yield from _hat(people, face, x, y)


def _back_hair(people: People, face: Face, hair: Tensor, x: Tensor, y: Tensor) -> Iterator[Layer]:
    a = face.half_width
    long = torch.minimum(ellipse(x, y + 0.12, 1.22 * a, 0.56), box(x, y - 0.22, 1.20 * a, 0.50, 0.12))
    yield Layer("long hair behind", "hair", long, _paint(0.8 * hair), people["style"] == STYLES.index("long"))
    curly = ellipse(x, y + 0.16, 1.42 * a, 0.56) + _curls(x, y)
    yield Layer("curls behind", "hair", curly, _paint(0.85 * hair), people["style"] == STYLES.index("curly"))


def _body(people: People, face: Face, skin: Tensor, x: Tensor, y: Tensor) -> Iterator[Layer]:
    yield Layer("shirt", "clothes", ellipse(x, y - 1.12, 0.82, 0.50), _paint(palette(SHIRTS, people["shirt"])))
    neck = box(x, y - 0.55, 0.15 + 0.03 * _columns(people)("gender"), 0.22, 0.05)
    yield Layer("neck", "skin", neck, _paint(0.88 * skin))
    for name, side in (("left ear", -1), ("right ear", 1)):
        ear = ellipse(x - side * (face.half_width + 0.01), y - 0.02, 0.075, 0.11)
        yield Layer(name, "skin", ear, _paint(0.92 * skin))


def _face(people: People, face: Face, skin: Tensor, hair: Tensor, x: Tensor, y: Tensor) -> Iterator[Layer]:
    column = _columns(people)
    a, b, jaw = face.half_width, face.half_height, column("jaw")
    width = a * (1 + 1.6 * (0.10 * jaw - 0.07) * (y - 0.05).clamp(min=0) / b)
    outline = superellipse(x, y, width, b, 2.2 + 0.35 * jaw, a)
    shade = (1 + 1.5 * column("light") * x).unsqueeze(1).clamp(0.7, 1.3)
    yield Layer("face", "skin", outline, _paint(skin) * shade)
    beard = torch.maximum(outline, -ellipse(x - face.turn, y + 0.12, 0.93 * a, 0.42))
    yield Layer("beard", "beard", beard, _paint(0.9 * hair), people["beard"] == BEARDS.index("beard"))
    moustache = ellipse(x - face.turn, y - face.mouth_y + 0.085, 0.17, 0.05)
    yield Layer("moustache", "beard", moustache, _paint(0.9 * hair), people["beard"] >= BEARDS.index("moustache"))


def _mouth(people: People, face: Face, skin: Tensor, x: Tensor, y: Tensor) -> Iterator[Layer]:
    column = _columns(people)
    man, opened = column("gender"), column("mouth_open")
    along = (x - face.turn) / face.mouth_half_width
    off = (y - face.mouth_y + face.mouth_curve * (along.square().clamp(max=1.5) - 0.5)).abs()
    beyond = (x - face.turn).abs() - face.mouth_half_width
    belly = (1 - along.square()).clamp(min=0)
    half_height = (0.036 + 0.008 * (1 - man) + 0.012 * column("lip") + 0.035 * opened * belly) * (
        1 - 0.5 * along.square().clamp(max=1)
    )
    rouge = 0.3 * skin + 0.7 * torch.tensor([0.75, 0.12, 0.20])
    lips = torch.where(people["gender"].unsqueeze(1) == 1, skin * torch.tensor([0.80, 0.58, 0.55]), rouge)
    yield Layer("lips", "mouth", torch.maximum(off - half_height, beyond), _paint(lips))
    hole = torch.maximum(off - 0.03 * opened * belly, beyond)
    yield Layer("open mouth", "mouth", hole, _flat(_MOUTH_HOLE), people["mouth_open"] > 0.15)


def _nose(people: People, face: Face, skin: Tensor, x: Tensor, y: Tensor) -> Iterator[Layer]:
    column = _columns(people)
    length, width = 0.13 + 0.03 * column("nose_length"), 0.055 + 0.02 * column("nose_width")
    down = y - face.nose_y
    tip = ellipse(x - 1.25 * face.turn, down, width, 0.045)
    flare = 0.012 + 0.35 * width * ((down + length) / length).clamp(0, 1)
    bridge = torch.maximum((x - 1.15 * face.turn).abs() - flare, (down + length / 2).abs() - length / 2)
    yield Layer("nose", "nose", torch.minimum(tip, bridge), _paint(0.80 * skin))


def _eyes(people: People, face: Face, hair: Tensor, x: Tensor, y: Tensor) -> Iterator[Layer]:
    column = _columns(people)
    iris = palette(EYES, people["eye"])
    size = 0.072 + 0.016 * column("eye_size")
    half_brow = 0.018 + 0.009 * column("brow_thickness") + 0.007 * column("gender")
    up = y - face.eye_y
    for side_name, side in (("left", -1), ("right", 1)):
        across, gaze = x - face.turn - side * face.eye_gap, x - 1.1 * face.turn - side * face.eye_gap
        yield Layer(f"{side_name} eye", "eyes", ellipse(across, up, size, 0.72 * size), _flat(_WHITE))
        yield Layer(f"{side_name} iris", "eyes", ellipse(gaze, up, 0.55 * size, 0.60 * size), _paint(iris))
        yield Layer(f"{side_name} pupil", "eyes", ellipse(gaze, up, 0.28 * size, 0.30 * size), _paint(0.15 * iris))
        brow = torch.maximum((up + 0.125 - across.square()).abs() - half_brow, across.abs() - 0.095)
        yield Layer(f"{side_name} brow", "brows", brow, _paint(0.75 * hair))


def _front_hair(people: People, face: Face, hair: Tensor, x: Tensor, y: Tensor) -> Iterator[Layer]:
    column = _columns(people)
    a, tall = face.half_width, 0.03 * column("face_length")
    fringe = y + 0.27 - 0.06 * ((x - 0.5 * face.turn) / 0.3).square() - 0.22 * ((x / a).square() - 0.35)
    short = torch.maximum(ellipse(x, y + 0.08, 1.10 * a, 0.545 + tall), fringe)
    long = torch.maximum(
        ellipse(x, y + 0.06, 1.16 * a, 0.575 + tall), y + 0.24 - 0.65 * (x.abs() / a - 0.35).clamp(min=-0.1)
    )
    curly = torch.maximum(
        ellipse(x, y + 0.14, 1.26 * a, 0.54) + 0.7 * _curls(x, y),
        y + 0.25 - 0.45 * (x.abs() / a - 0.45).clamp(min=-0.1),
    )
    for style, distance in (("short", short), ("long", long), ("curly", curly)):
        yield Layer(f"{style} hair", "hair", distance, _paint(hair), people["style"] == STYLES.index(style))


def _glasses(people: People, face: Face, x: Tensor, y: Tensor) -> Iterator[Layer]:
    rim, down = 0.026, y - face.eye_y
    for side in (-1, 1):
        across = x - face.turn - side * face.eye_gap
        round_rim = ellipse(across, down, 0.13, 0.13).abs() - rim
        yield Layer("round rim", "glasses", round_rim, _flat(_FRAME), people["glasses"] == GLASSES.index("round"))
        square_rim = box(across, down - 0.01, 0.145, 0.095, 0.02).abs() - rim
        yield Layer("square rim", "glasses", square_rim, _flat(_FRAME), people["glasses"] == GLASSES.index("square"))
    worn = people["glasses"] > 0
    away = (x - face.turn).abs()
    bridge = torch.maximum((down + 0.01).abs() - 0.018, away - (face.eye_gap - 0.11).clamp(min=0.02))
    yield Layer("bridge", "glasses", bridge, _flat(_FRAME), worn)
    temple = torch.maximum((down + 0.03).abs() - 0.018, (away - face.eye_gap - 0.19).abs() - 0.07)
    yield Layer("temples", "glasses", torch.maximum(temple, x.abs() - face.half_width - 0.02), _flat(_FRAME), worn)


def _hat(people: People, face: Face, x: Tensor, y: Tensor) -> Iterator[Layer]:
    a, colour = face.half_width, palette(HAT_COLOURS, people["hat_colour"])
    cap, beanie = (people["hat"] == HATS.index(kind) for kind in ("cap", "beanie"))
    crown = torch.maximum(ellipse(x, y + 0.24, 1.18 * a, 0.44), y + 0.30)
    yield Layer("crown", "hat", crown, _paint(colour), cap | beanie)
    yield Layer("peak", "hat", box(x - 2 * face.turn, y + 0.31, 1.28 * a, 0.045, 0.04), _paint(0.7 * colour), cap)
    yield Layer("cuff", "hat", box(x, y + 0.34, 1.17 * a, 0.075, 0.05), _paint(0.7 * colour), beanie)
    yield Layer("bobble", "hat", ellipse(x, y + 0.70, 0.085, 0.085), _paint(0.5 * colour + 0.5), beanie)


def _curls(x: Tensor, y: Tensor) -> Tensor:
    return 0.035 * torch.sin(16 * torch.atan2(y + 0.16, x))


def _columns(people: People) -> Callable[[str], Tensor]:
    return lambda name: people[name].float().view(-1, 1, 1)


def palette(colours: Mapping[str, Colour], classes: Tensor) -> Tensor:
    """Returns the colour of each class, n 3."""
    return torch.tensor(list(colours.values()))[classes]


def _paint(colour: Tensor) -> Tensor:
    return colour.view(-1, 3, 1, 1)


def _flat(colour: Colour) -> Tensor:
    return torch.tensor(colour).view(1, 3, 1, 1)
