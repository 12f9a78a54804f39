"""Pools: B images choose among M > B noises, all at once, so that no noise is given twice.

Between the permutation of `assign_noise` (M = B) and the nearest of k draws of `select_noise`, as two public trainers
offer it. M - B noises are discarded, so that what remains is no longer exactly Gaussian: like the nearest of k, the
squared distance prefers short noise, and both scores widen it along the data's main directions.
"""

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from .batch import check_choice, check_images, non_finite_message
from .cost import cost_matrix
from .select import Score


@torch.no_grad()
def choose_noise(
    x: Float[Tensor, "b *data"], noise: Float[Tensor, "m *data"], *, score: Score = "l2"
) -> Float[Tensor, "b *data"]:
    """Returns for each image a noise of its own out of a pool, with the least sum of squared distances.

    Args:
        x: Clean batch as the diffusion sees it.
        noise: Pool of at least as many independent Gaussian noises.
        score: "l2" makes the squared distances least; "inner" makes the inner products largest, which leaves the
            noise's mean square norm nearly right.

    Raises:
        ValueError: The pool is smaller than the batch, its noises have another shape, or a tensor holds NaN or
            infinity.

    Example:
        >>> x = torch.randn(8, 4, 8, 8)
        >>> choose_noise(x, torch.randn(32, 4, 8, 8)).shape
        torch.Size([8, 4, 8, 8])
    """
    check_images(x)
    check_images(noise, "noise")
    check_choice("score", score, Score)
    if x.shape[1:] != noise.shape[1:]:
        raise ValueError(f"x has rows of shape {list(x.shape[1:])}, noise of {list(noise.shape[1:])}; make them equal")
    if len(noise) < len(x):
        raise ValueError(f"noise has {len(noise)} rows for {len(x)} images; give a pool of at least as many")
    images, rows = x.flatten(1), noise.flatten(1)
    costs = cost_matrix(images, rows)
    if score == "l2":  # a noise's own norm counts where noises are left over
        costs = costs + rows.float().square().sum(1) / 2
    host = costs.double().cpu().numpy()
    if not np.isfinite(host).all():
        raise ValueError(non_finite_message(x=x, noise=noise))
    columns = torch.from_numpy(linear_sum_assignment(host)[1])
    return noise[columns.to(noise.device)]
