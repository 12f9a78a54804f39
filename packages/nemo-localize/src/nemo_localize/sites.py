"""Where the value neurons of a model are: the outputs of the value projections that read the text.

Neuron i of a layer is output channel i of its `to_v`. In the U-Nets handled here the text states enter every
cross-attention unchanged, so values depend on the prompt alone: not on x_t, the seed or the timestep. Attention never
mixes channels of one head with another's, so ablating neuron i is zeroing row i of the weight.
"""

import re
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from diffcore.errors import IncompatibleModelError
from diffcore.hooks import Site, intervene, match
from nemo_localize.neurons import NeuronSet

_LATER = {
    "PixArtTransformer2DModel": "PixArt",
    "SD3Transformer2DModel": "Stable Diffusion 3",
    "FluxTransformer2DModel": "Flux",
}
_BLOCKS = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}


@dataclass(frozen=True)
class ValueSites:
    """The value layers that are searched, shallowest first; their neurons are numbered across all layers from 0.

    Attributes:
        sites: Outputs of value projections: down blocks, mid block, and up blocks where asked for.
        widths: Number of neurons in each layer.
    """

    sites: tuple[Site, ...]
    widths: tuple[int, ...]

    @property
    def num_neurons(self) -> int:
        """Number of neurons in all layers together."""
        return sum(self.widths)

    @cached_property
    def spans(self) -> tuple[range, ...]:
        """The numbers of each layer's neurons."""
        ends = list(accumulate(self.widths, initial=0))
        return tuple(range(start, end) for start, end in pairwise(ends))

    def named(self, numbers: Iterable[int]) -> NeuronSet:
        """Returns the set of the neurons with given numbers."""
        wanted = set(numbers)
        return NeuronSet.of(
            {
                site.module: [number - span.start for number in span if number in wanted]
                for site, span in zip(self.sites, self.spans, strict=True)
            }
        )

    def numbers(self, neurons: NeuronSet) -> frozenset[int]:
        """Returns the numbers of the neurons of a set.

        Raises:
            IncompatibleModelError: A neuron is not in these layers.
        """
        spans = {site.module: span for site, span in zip(self.sites, self.spans, strict=True)}
        for name, index in neurons:
            if name not in spans or index >= len(spans[name]):
                raise IncompatibleModelError(f"{name}[{index}] is no searched neuron of this model; use its own model")
        return frozenset(spans[name][index] for name, index in neurons)

    def table(self, sets: Sequence[Iterable[int]]) -> Bool[Tensor, "rows neurons"]:
        """Returns one row per set of numbers, True at its members; on the CPU."""
        table = torch.zeros(len(sets), self.num_neurons, dtype=torch.bool)
        rows = [row for row, members in enumerate(sets) for _ in members]
        table[rows, [number for members in sets for number in members]] = True
        return table

    def masks(self, ablated: Bool[Tensor, "rows neurons"], *, scale: float = 0.0) -> dict[str | Site, Tensor]:
        """Returns what multiplies the values of each layer in which some row has ablated neurons.

        Args:
            ablated: One row per batch row, True at its ablated neurons; on the CPU, so that nothing waits.
            scale: Factor of the ablated neurons' outputs.
        """
        parts = [(site, part[:, None]) for site, part in zip(self.sites, ablated.split(self.widths, 1), strict=True)]
        touched = [(site, part) for site, part in parts if bool(part.any())]
        return {site: torch.where(part, scale, 1.0) if scale else ~part for site, part in touched}


def value_sites(backbone: nn.Module, *, up: bool = False) -> ValueSites:
    """Returns the value layers of a text-conditioned U-Net: Stable Diffusion 1.x, 2.x, XL, and the zoo's.

    Args:
        backbone: U-Net of the model, `DiffusionModel.backbone`.
        up: Whether to search the up blocks too, which hardly matter in the paper (appendix C.8).

    Raises:
        IncompatibleModelError: The network is of another kind, or reads no text.
    """
    kind = next((k.__name__ for k in type(backbone).__mro__ if k.__name__ == "UNet2DConditionModel"), None)
    if kind is None:
        name = type(backbone).__name__
        if name in _LATER:
            raise IncompatibleModelError(
                f"{_LATER[name]} ({name}) is not supported yet; U-Nets of Stable Diffusion 1.x, 2.x and XL are"
            )
        raise IncompatibleModelError(
            f"{name} has no cross-attention on text, so no neuron can recognise a prompt; "
            "give a text-to-image U-Net (Stable Diffusion 1.x, 2.x or XL)"
        )
    names = [name for name in _value_modules(backbone) if up or not name.startswith("up_blocks.")]
    if not names:
        raise IncompatibleModelError(
            f"{kind} has no cross-attention on text in its down and mid blocks; nothing here can be searched"
        )
    names.sort(key=lambda name: _BLOCKS[name.partition(".")[0]])
    projections: list[Any] = [backbone.get_submodule(name) for name in names]
    widths = tuple(int(projection.out_features) for projection in projections)
    return ValueSites(tuple(Site(name) for name in names), widths)


def ablated_rows(
    backbone: nn.Module, sites: ValueSites, ablated: Bool[Tensor, "rows neurons"], *, scale: float = 0.0
) -> AbstractContextManager[None]:
    """Ablates, in each row of the batch, its own set of neurons while the block runs.

    Args:
        backbone: The network that the sites belong to.
        sites: The value layers of that network.
        ablated: One row per batch row, made by `ValueSites.table`; on the CPU.
        scale: Factor of the ablated neurons' outputs.
    """
    return intervene(backbone, sites.masks(ablated, scale=scale))


def _value_modules(backbone: nn.Module) -> list[str]:
    """Returns the names of value projections that read the text, in the order in which the network runs them."""
    modules = dict(backbone.named_modules())
    found = []
    for site in match(backbone, "*"):
        block = re.fullmatch(
            r"((?:down_blocks|mid_block|up_blocks)\..*transformer_blocks\.\d+)\.(attn[12])\.to_v", site.module
        )
        # In gated blocks the first attention reads the text too.
        if block and (block[2] == "attn2" or getattr(modules[block[1]], "only_cross_attention", False)):
            found.append(site.module)
    return found
