"""CLIP score: how well images fit their prompts, as the cosine of CLIP's embeddings of both.

References:
    Hessel et al. 2021, equation 1, with the weight 100 that the field settled on instead of 2.5.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from diffcore.stats import ExactMetric, require_finite


class PromptFit(NamedTuple):
    """Mean in [0, 100], its standard error, the number of images, and for how many of them CLIP read half a prompt."""

    value: float
    standard_error: float
    n: int
    num_truncated: int


class ClipScore(ExactMetric):
    """Mean of `100 max(cosine, 0)` over pairs of image and prompt; `compute` returns `PromptFit`.

    Args:
        options: Keyword arguments of `torchmetrics.Metric`.
    """

    full_state_update = False
    total: Tensor
    squares: Tensor
    num_images: Tensor
    num_truncated: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        for name in ("total", "squares", "num_images", "num_truncated"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self,
        image_features: Float[Tensor, "b d"],
        text_features: Float[Tensor, "b d"],
        truncated: Bool[Tensor, " b"] | None = None,
    ) -> None:
        """Adds pairs of image and prompt, given by their embeddings.

        Args:
            image_features: CLIP's projected embeddings of images.
            text_features: CLIP's projected embeddings of their prompts.
            truncated: Whether each prompt was longer than CLIP reads.

        Raises:
            ValueError: Rows hold NaN or infinity, or zeros alone; they are named.
        """
        sides = []
        for name, features in (("image", image_features), ("text", text_features)):
            require_finite(f"{name} features", features, int(self.num_images))
            zero = (features == 0).all(1).nonzero().flatten()
            if len(zero):
                row = int(self.num_images) + int(zero[0])
                raise ValueError(f"{name} features are all 0 in row {row}; they have no direction, leave the row out")
            sides.append(functional.normalize(features.detach().double(), dim=1, eps=0.0))
        scores = 100 * (sides[0] * sides[1]).sum(1).clamp(min=0)
        self.total += scores.sum()
        self.squares += scores.square().sum()
        self.num_images += len(scores)
        if truncated is not None:
            self.num_truncated += truncated.sum()

    def compute(self) -> PromptFit:
        """Returns the mean over all pairs seen, over all processes.

        Raises:
            ValueError: No pairs were added.
        """
        n = int(self.num_images)
        if not n:
            raise ValueError("no pairs of image and prompt were compared; update with features first")
        mean = float(self.total) / n
        variance = max(float(self.squares) / n - mean**2, 0.0) / (n - 1) if n > 1 else math.nan
        return PromptFit(mean, math.sqrt(variance), n, int(self.num_truncated))
