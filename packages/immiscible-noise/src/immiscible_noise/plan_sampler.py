"""The plan sampler of torchcfm's trainers, by an exact assignment: each x1 stays in place and meets a noise of its own.

torchcfm's default draws pairs with replacement, so that a third of a batch's images is left out of each step. Here the
noise x0 is permuted, and x1 keeps its order and its labels.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from .assign import assign_noise


class ExactAssignmentPlanSampler:
    """Has the methods that torchcfm's trainers call on their `OTPlanSampler`.

    Args:
        respect_labels: Let noise be exchanged only among images with equal labels, which a class-conditional model
            needs.

    Example:
        >>> import torch
        >>> x0, x1, y1 = torch.randn(8, 2), torch.randn(8, 2), torch.arange(8) % 2
        >>> noise, images, _, labels = ExactAssignmentPlanSampler().sample_plan_with_labels(x0, x1, None, y1)
        >>> images is x1, labels is y1
        (True, True)
    """

    def __init__(self, *, respect_labels: bool = True) -> None:
        self.respect_labels = respect_labels

    def sample_plan(
        self, x0: Float[Tensor, "b *data"], x1: Float[Tensor, "b *data"], replace: bool = False
    ) -> tuple[Float[Tensor, "b *data"], Float[Tensor, "b *data"]]:
        """Returns the noise in the order of the images, and the images as they were.

        Args:
            x0: Gaussian noise of the batch.
            x1: Images of the batch.
            replace: Must be False: a permutation repeats nothing.

        Raises:
            ValueError: Sampling with replacement is asked for.
        """
        _check(replace)
        return assign_noise(x1, x0), x1

    def sample_plan_with_scipy(
        self, x0: Float[Tensor, "b *data"], x1: Float[Tensor, "b *data"]
    ) -> tuple[Float[Tensor, "b *data"], Float[Tensor, "b *data"]]:
        """Returns what `sample_plan` does.

        Args:
            x0: Gaussian noise of the batch.
            x1: Images of the batch.
        """
        return self.sample_plan(x0, x1)

    def sample_plan_with_labels(
        self,
        x0: Float[Tensor, "b *data"],
        x1: Float[Tensor, "b *data"],
        y0: Any = None,
        y1: Any = None,
        replace: bool = False,
    ) -> tuple[Float[Tensor, "b *data"], Float[Tensor, "b *data"], Any, Any]:
        """Returns the noise in the order of the images, the images, and both labels, those of the noise in its order.

        Args:
            x0: Gaussian noise of the batch.
            x1: Images of the batch.
            y0: Labels that go with the noise, a tensor that is permuted with it; None if there are none.
            y1: Labels of the images, which stay in place.
            replace: Must be False: a permutation repeats nothing.

        Raises:
            ValueError: Sampling with replacement is asked for.
        """
        _check(replace)
        labels = y1 if self.respect_labels else None
        noise, info = assign_noise(x1, x0, labels=labels, return_info=True)
        return noise, x1, None if y0 is None else y0[info.permutation.to(y0.device)], y1


def _check(replace: bool) -> None:
    if replace:
        raise ValueError("replace is True, but an assignment gives each noise once; leave `replace` at False")
