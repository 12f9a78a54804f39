"""Real handwritten digits of 8x8 pixels, plain and in styles of five numbers."""

from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from diffcore.errors import MissingDependencyError
from diffcore.noise import Rows, philox_uniform

SIZE = 8
DIGITS = tuple(str(digit) for digit in range(10))
STYLES = ("ink", "background", "slant", "thickness", "shift")
"""Each number is in [-1, 1]."""

_STYLE_STREAM = 20


def load_digits() -> tuple[Float[Tensor, "n 1 8 8"], Int[Tensor, " n"]]:
    """Returns the 1797 digits that scikit-learn carries, ink 1 on paper 0, and which digit each is.

    Raises:
        MissingDependencyError: scikit-learn is not installed; only training needs it.

    References:
        Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
    """
    try:
        from sklearn.datasets import load_digits as bundled
    except ImportError as error:
        raise MissingDependencyError("the digits come with scikit-learn; pip install scikit-learn") from error
    data = cast(Any, bundled())
    images = torch.as_tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    return images, torch.as_tensor(data.target, dtype=torch.int64)


def split(labels: Int[Tensor, " n"]) -> tuple[Int[Tensor, " a"], Int[Tensor, " b"]]:
    """Returns the rows to train judges with, and every fifth, to test them with."""
    rows = torch.arange(len(labels))
    held_out = rows % 5 == 4
    return rows[~held_out], rows[held_out]


def draw_styles(seed: int, rows: Rows) -> Float[Tensor, "b 5"]:
    """Draws styles uniformly; row i depends on (`seed`, `rows[i]`) alone."""
    return 2 * philox_uniform(seed, rows, (len(STYLES),), stream=_STYLE_STREAM) - 1


def render(digits: Float[Tensor, "b 1 8 8"], styles: Float[Tensor, "b 5"]) -> Float[Tensor, "b 1 8 8"]:
    """Returns digits in styles, in model space (about [-1, 1]).

    Slant and shift move the ink, thickness spreads it, ink and background are the two grey levels.

    Args:
        digits: Digits with ink 1 on paper 0.
        styles: Style numbers in the order of `STYLES`.
    """
    ink, background, slant, thickness, shift = (s.view(-1, 1, 1, 1) for s in styles.unbind(1))
    affine = torch.eye(2, 3).repeat(len(digits), 1, 1)
    affine[:, 0, 1], affine[:, 0, 2] = -0.35 * slant.flatten(), -0.25 * shift.flatten()
    grid = F.affine_grid(affine, list(digits.shape), align_corners=False)
    x = F.grid_sample(digits, grid, align_corners=False)
    thick = (thickness + 1) / 2
    x = (1 - thick) * x + thick * (0.35 * x + 0.65 * F.max_pool2d(x, 3, 1, 1))
    paper = -0.6 + 0.4 * background
    return paper + (0.65 + 0.35 * ink - paper) * x
