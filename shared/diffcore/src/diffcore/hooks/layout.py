"""The meaning of sequences in an attention call: image tokens, text tokens, and the image's height and width."""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """The ranges of image tokens and text tokens in an attention call.

    Attributes:
        places: Range of the queries that are image tokens.
        tokens: Keys that are text tokens; all keys where text and image attend separately.
        grid: Rows and columns of image tokens.
    """

    places: range
    tokens: slice
    grid: tuple[int, int]


@dataclass(frozen=True)
class NetworkCall:
    """Facts about the sequences inside, taken from the arguments of the whole network.

    Attributes:
        size: Height and width of the sample, for networks that take images.
        grid: Rows and columns of image tokens, for networks that take sequences with positions (Flux).
        num_text: Number of text tokens; None where the call does not tell.
    """

    size: tuple[int, int] | None = None
    grid: tuple[int, int] | None = None
    num_text: int | None = None


def network_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> NetworkCall:
    """Reads the arguments of a network."""
    pictures = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim == 4)
    picture = next(pictures, None)
    text, positions = kwargs.get("encoder_hidden_states"), kwargs.get("img_ids")
    return NetworkCall(
        size=None if picture is None else (picture.shape[2], picture.shape[3]),
        grid=None if positions is None else (int(positions[..., 1].max()) + 1, int(positions[..., 2].max()) + 1),
        num_text=None if text is None else text.shape[1],
    )


def layout(
    network: NetworkCall, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], num_queries: int
) -> Layout:
    """Reads one attention call: image first and text after in SD3, text first in Flux, no mixture elsewhere.

    Args:
        network: Arguments of the whole network in the same forward pass.
        module: The attention module that was called.
        args: Positional arguments of the module.
        kwargs: Keyword arguments of the module.
        num_queries: Length of the query sequence.

    Raises:
        ValueError: The number of text tokens, or height and width, cannot be determined.
    """
    places, tokens = range(num_queries), slice(None)
    if any(kind.__name__ == "FluxAttention" for kind in type(module).__mro__):
        if network.num_text is None:
            raise ValueError("image and text cannot be told apart; call the network with encoder_hidden_states=")
        places, tokens = range(network.num_text, num_queries), slice(0, network.num_text)
    elif getattr(module, "add_k_proj", None) is not None and kwargs.get("encoder_hidden_states") is not None:
        num_places = num_queries - kwargs["encoder_hidden_states"].shape[1]
        places, tokens = range(num_places), slice(num_places, num_queries)
    hidden = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    return Layout(places, tokens, _grid(network, hidden, len(places)))


def grid_of(size: tuple[int, int], num_places: int) -> tuple[int, int] | None:
    """Returns height and width of a sequence of image places; None where its length fits no grid of the sample.

    Args:
        size: Height and width of the sample.
        num_places: Length of the sequence.
    """
    # Patches and strides divide both sides by one number and round up.
    grids = ((-(-size[0] // factor), -(-size[1] // factor)) for factor in range(1, max(size) + 1))
    return next((grid for grid in grids if math.prod(grid) == num_places), None)


def _grid(network: NetworkCall, hidden: Tensor, num_places: int) -> tuple[int, int]:
    if hidden.ndim == 4:
        return hidden.shape[2], hidden.shape[3]
    if network.grid is not None and math.prod(network.grid) == num_places:
        return network.grid
    size = network.size or (math.isqrt(num_places), math.isqrt(num_places))
    if (grid := grid_of(size, num_places)) is None:
        raise ValueError(f"{num_places} places are no picture of a {size[0]}x{size[1]} sample; use another reduction")
    return grid
