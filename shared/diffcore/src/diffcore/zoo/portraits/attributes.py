"""The attributes of portraits with their values and colours, and the names of parts and key points."""

from collections.abc import Mapping
from typing import Final

Colour = tuple[float, float, float]

GENDERS: Final = ("woman", "man")
STYLES: Final = ("bald", "short", "long", "curly")
GLASSES: Final = ("none", "round", "square")
BEARDS: Final = ("none", "moustache", "beard")
HATS: Final = ("none", "cap", "beanie")
SMILES: Final = ("neutral", "sad", "smiling")

SKINS: Final[Mapping[str, Colour]] = {
    "pale": (0.98, 0.86, 0.78),
    "light": (0.93, 0.74, 0.60),
    "tan": (0.80, 0.58, 0.42),
    "brown": (0.58, 0.38, 0.26),
    "dark": (0.36, 0.23, 0.17),
}
HAIRS: Final[Mapping[str, Colour]] = {
    "black": (0.10, 0.09, 0.10),
    "brown": (0.38, 0.22, 0.12),
    "blond": (0.90, 0.76, 0.38),
    "red": (0.75, 0.28, 0.10),
    "grey": (0.66, 0.66, 0.68),
}
EYES: Final[Mapping[str, Colour]] = {
    "brown": (0.36, 0.20, 0.10),
    "blue": (0.20, 0.45, 0.80),
    "green": (0.25, 0.55, 0.30),
}
HAT_COLOURS: Final[Mapping[str, Colour]] = {
    "red": (0.80, 0.15, 0.18),
    "blue": (0.15, 0.30, 0.70),
    "black": (0.13, 0.13, 0.15),
    "green": (0.15, 0.48, 0.28),
}
BACKGROUNDS: Final[Mapping[str, Colour]] = {
    "blue": (0.35, 0.55, 0.85),
    "green": (0.40, 0.70, 0.45),
    "yellow": (0.93, 0.85, 0.45),
    "pink": (0.93, 0.65, 0.75),
    "purple": (0.58, 0.45, 0.75),
    "white": (0.95, 0.95, 0.95),
    "orange": (0.93, 0.60, 0.30),
    "teal": (0.25, 0.62, 0.62),
}
SHIRTS: Final[Mapping[str, Colour]] = {
    "red": (0.78, 0.18, 0.20),
    "navy": (0.14, 0.20, 0.42),
    "white": (0.90, 0.90, 0.90),
    "green": (0.20, 0.50, 0.30),
    "yellow": (0.90, 0.75, 0.20),
    "black": (0.15, 0.15, 0.17),
}

FACE_PROPORTIONS: Final = (
    "face_width",
    "face_length",
    "jaw",
    "eye_size",
    "eye_gap",
    "nose_length",
    "nose_width",
    "mouth_width",
    "lip",
    "brow_thickness",
)
"""The continuous part of an identity, each in [-1, 1]."""

PARTS: Final = (
    "background",
    "skin",
    "hair",
    "eyes",
    "mouth",
    "nose",
    "brows",
    "beard",
    "glasses",
    "hat",
    "clothes",
)
"""Classes of the label map, in the order of their numbers."""


KEYPOINTS: Final = (
    "left eye",
    "right eye",
    "nose",
    "left mouth corner",
    "right mouth corner",
    "chin",
    "left ear",
    "right ear",
    "head top",
    "left brow",
    "right brow",
    "left shoulder",
    "right shoulder",
)
"""Left and right as the viewer sees them."""

CLASSES: Final[Mapping[str, tuple[str, ...]]] = {
    "gender": GENDERS,
    "skin": tuple(SKINS),
    "hair": tuple(HAIRS),
    "style": STYLES,
    "glasses": GLASSES,
    "beard": BEARDS,
    "hat": HATS,
    "background": tuple(BACKGROUNDS),
    "smile": SMILES,
    "shirt": tuple(SHIRTS),
}
"""What the oracle reads off a picture."""
