"""Generator and student score as LoRA on one shared copy of the teacher's weights.

Three networks take the memory of one and two small adapters, and the teacher runs without an adapter as it always did.
"""

from torch import Tensor, nn

from diffcore.train.lora import LoraDenoiser

__all__ = ["LoraDenoiser", "learnable", "lora_of"]


def learnable(network: nn.Module) -> list[Tensor]:
    """Returns the parameters of a network that may learn: all, but for the shared weights under a LoRA.

    Args:
        network: Generator or student score.
    """
    shared = {id(p) for part in network.modules() if isinstance(part, LoraDenoiser) for p in part.base_parameters()}
    return [part for part in network.parameters() if id(part) not in shared]


def lora_of(network: nn.Module) -> LoraDenoiser | None:
    """Returns the LoRA inside a generator; None where its weights are its own.

    Args:
        network: Generator, or any other network.
    """
    return next((part for part in network.modules() if isinstance(part, LoraDenoiser)), None)
