"""Conditions of a backbone that are made outside it, such as what a ControlNet adds."""

from collections.abc import Mapping, Sequence

from torch import Tensor


def with_controlnet(condition: Mapping[str, Tensor], down: Sequence[Tensor], mid: Tensor) -> dict[str, Tensor]:
    """Returns a condition with the residuals that a ControlNet computed for the same x_t and timestep.

    Args:
        condition: Condition of the U-Net.
        down: First result of a ControlNet of the diffusers library, one tensor for each that the down blocks push.
        mid: Second result of the ControlNet.

    Example:
        >>> import torch
        >>> residual = torch.zeros(1, 4, 8, 8)
        >>> sorted(with_controlnet({}, [residual, residual], residual))[1:]
        ['down_block_additional_residual_1', 'mid_block_additional_residual']
    """
    residuals = {f"down_block_additional_residual_{number}": tensor for number, tensor in enumerate(down)}
    return {**condition, **residuals, "mid_block_additional_residual": mid}
