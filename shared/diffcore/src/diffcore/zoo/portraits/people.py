"""People as columns of numbers: the attributes of a person, and the circumstances of each image.

A group of people is a dictionary of tensors with one row each, so an attribute is edited by changing one column, and
one person in many situations is one identity row repeated beside fresh nuisance rows.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from diffcore.noise import Rows, philox_normal, philox_uniform
from diffcore.zoo.portraits.attributes import BACKGROUNDS, EYES, FACE_PROPORTIONS, HAIRS, HAT_COLOURS, SHIRTS, SKINS

People = dict[str, Tensor]
"""Column name -> one row per person."""

# Streams of the counter-based generator.
_IDENTITY, _IDENTITY_JITTER, _NUISANCE, _NUISANCE_JITTER = range(4)

# Cumulative probabilities of all classes but the last; two rows are woman and man.
_STYLE = ((0.03, 0.20, 0.72), (0.22, 0.75, 0.87))
_BEARD = ((1.0, 1.0), (0.45, 0.65))
_GLASSES = (0.6, 0.8)
_HAT = (0.72, 0.86)


def identities(seed: int, indices: Rows) -> People:
    """Draws the identities of people: row i depends on (`seed`, `indices[i]`) alone.

    Categories are class numbers (int64) in the order of `attributes`; face proportions are in [-1, 1]; `skin_jitter`
    and `hair_jitter` are small offsets of the colours (standard deviations .02 and .03).
    """
    u = philox_uniform(seed, indices, (9 + len(FACE_PROPORTIONS),), stream=_IDENTITY).unbind(1)
    jitter = philox_normal(seed, indices, (6,), stream=_IDENTITY_JITTER)
    gender = _uniform_class(u[0], 2)
    man = gender.float()
    people = {
        "gender": gender,
        "skin": _uniform_class(u[1], len(SKINS)),
        "hair": _uniform_class(u[2], len(HAIRS)),
        "eye": _uniform_class(u[3], len(EYES)),
        "style": _class(u[4], torch.tensor(_STYLE)[gender]),
        "glasses": _class(u[5], torch.tensor(_GLASSES)),
        "beard": _class(u[6], torch.tensor(_BEARD)[gender]),
        "hat": _class(u[7], torch.tensor(_HAT)),
        "hat_colour": _uniform_class(u[8], len(HAT_COLOURS)),
        "skin_jitter": 0.02 * jitter[:, :3],
        "hair_jitter": 0.03 * jitter[:, 3:],
    }
    people |= {name: 2 * value - 1 for name, value in zip(FACE_PROPORTIONS, u[9:], strict=True)}
    people["face_width"] = (people["face_width"] + 0.35 * man - 0.17).clamp(-1, 1)
    people["jaw"] = (0.7 * people["jaw"] + 0.5 * man - 0.25).clamp(-1, 1)
    return people


def nuisances(seed: int, indices: Rows) -> People:
    """Draws the circumstances that differ between images of one person: row i depends on (`seed`, `indices[i]`) alone.

    Shifts are in half widths of the image, `roll` in radians, `yaw` and `smile` in [-1, 1], `mouth_open` in [0, .8].
    """
    u = philox_uniform(seed, indices, (12,), stream=_NUISANCE).unbind(1)
    return {
        "shift_x": 0.12 * (2 * u[0] - 1),
        "shift_y": 0.08 * (2 * u[1] - 1),
        "scale": 0.88 + 0.24 * u[2],
        "roll": 0.22 * (2 * u[3] - 1),
        "yaw": 2 * u[4] - 1,
        "smile": 2 * u[5] - 1,
        "mouth_open": 2 * (u[6] - 0.6).clamp(min=0),
        "background": _uniform_class(u[7], len(BACKGROUNDS)),
        "background_jitter": 0.03 * philox_normal(seed, indices, (3,), stream=_NUISANCE_JITTER),
        "gradient": 0.18 * (2 * u[8] - 1),
        "gradient_angle": 2 * torch.pi * u[9],
        "shirt": _uniform_class(u[10], len(SHIRTS)),
        "light": 0.10 * (2 * u[11] - 1),
    }


def portraits(seed: int, indices: Rows) -> People:
    """Draws strangers, one image each: identity and nuisance rows of the same indices."""
    return identities(seed, indices) | nuisances(seed, indices)


def select(people: People, rows: Int[Tensor, " n"] | slice) -> People:
    """Returns some rows, in the order asked for; a row may come several times."""
    return {name: column[rows] for name, column in people.items()}


def smile_class(people: People) -> Int[Tensor, " n"]:
    """Returns 0 (neutral), 1 (sad) or 2 (smiling): what captions say and the oracle reads."""
    return torch.where(people["smile"] > 0.4, 2, torch.where(people["smile"] < -0.4, 1, 0))


def _uniform_class(u: Tensor, count: int) -> Tensor:
    return (u * count).long()


def _class(u: Tensor, cumulative: Tensor) -> Tensor:
    return (u.unsqueeze(1) >= cumulative).sum(1)
