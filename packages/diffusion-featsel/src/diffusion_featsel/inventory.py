"""The inventory: every inner activation of a backbone by the paper's names, with shapes and cumulative cost.

It is read from one forward pass on the meta device, so that weights are neither moved nor needed. The names that the
paper counts are N = 2 resnets + 8 blocks + transformers + samplers + 3: 197 for Stable Diffusion 1.5 and 2.1, and 612
for SDXL. Beyond them are listed: "res-inner" and "res-in" of residual blocks, "self-out", "cross-out", "ffn-out" and
"norm-out" of transformer blocks, keys and values of text, and "skip0", ..., which are other names of tensors that are
in the list already.

References:
    Meng et al. 2024, section 3 and appendix B.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
from torch import nn

from diffcore.checkpoint.catalog import current_class
from diffcore.denoiser.library import library_class
from diffcore.errors import IncompatibleModelError, printable
from diffcore.hooks import trace_sites
from diffcore.hooks.attach import require_hookable
from diffcore.models import DiffusionModel, site_table
from diffcore.models.backbones import latent_shape
from diffusion_featsel.activation import Activation
from diffusion_featsel.backbones import BACKBONES
from diffusion_featsel.name_sites import named_rows
from diffusion_featsel.names import canonical, unknown
from diffusion_featsel.paper_filter import Family, family_of, paper_filter
from diffusion_featsel.presets import presets_with


@dataclass(frozen=True)
class Inventory:
    """All activations of a backbone for one size of its input, in the order in which a forward pass makes them.

    Attributes:
        rows: The activations, other names of the same tensor included.
        size: Height and width of x_t.
        flops: Floating point operations of one whole forward pass with one row.
        model_class: Class name of the backbone.

    Example:
        >>> from diffcore.testing import tiny
        >>> found = inventory(tiny.backbone("sd15"))
        >>> found["up1-rep0-vit0-cross-q"].site.module
        'up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_q'
        >>> [row.name for row in found.match("up-level0-*-out")]
        ['up-level0-repeat0-res-out', 'up-level0-repeat1-res-out', 'up-level0-upsampler-out']
    """

    rows: tuple[Activation, ...]
    size: tuple[int, int]
    flops: int
    model_class: str

    def __iter__(self) -> Iterator[Activation]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._find(name) is not None

    def __getitem__(self, name: str) -> Activation:
        """Returns the activation of a name: the paper's, an abbreviation of it, or that of a module.

        Raises:
            NoMatchError: There is none; the message lists the nearest names.
        """
        found = self._find(name)
        if found is None:
            raise unknown(name, self._by_name, f"this {self.model_class}")
        return found

    @property
    def paper(self) -> tuple[Activation, ...]:
        """The activations that the paper counts."""
        return tuple(row for row in self.rows if row.paper)

    @property
    def features(self) -> tuple[Activation, ...]:
        """The activations that can be taken as features: tensors with image places, each once."""
        return tuple(row for row in self.rows if row.grid and not row.derived and row.same_as is None)

    @property
    def maps(self) -> tuple[str, ...]:
        """The names of attention maps, which are computed from queries and keys."""
        return tuple(row.name for row in self.rows if row.derived)

    @property
    def family(self) -> Family | None:
        """The architecture whose names the paper's tables and presets use; None for others."""
        return family_of({row.name for row in self.paper}) if self.model_class == "UNet2DConditionModel" else None

    def to_rows(self) -> list[dict[str, Any]]:
        """Returns plain values for JSON and CSV, one dictionary per activation.

        Beside the attributes are the presets that an activation is in, and whether the paper's filter keeps it: true,
        false with the reason in "dropped", or null for models that the filter was not made for.
        """
        family = self.family
        kept, dropped = set[str](), dict[str, str]()
        if family is not None:
            found = paper_filter([row.name for row in self.rows], family)
            kept, dropped = set(found.kept), dict(found.dropped)
        return [
            row.to_json()
            | {
                "presets": presets_with(row.name, family),
                "paper_keeps": None if family is None else row.name in kept,
                "dropped": dropped.get(row.name),
            }
            for row in self.rows
        ]

    def named(self, names: str | Sequence[str]) -> list[Activation]:
        """Returns the activations of names, in the given order.

        Args:
            names: The paper's names, abbreviations of them, or dotted names of modules.

        Raises:
            NoMatchError: A name is unknown; the message lists the nearest names.
        """
        return [self[name] for name in ([names] if isinstance(names, str) else names)]

    def match(self, patterns: str | Sequence[str]) -> list[Activation]:
        """Returns the activations whose names match any of the patterns, in the order of execution.

        Args:
            patterns: Shell patterns such as "up-*-cross-q"; each one has to match something.

        Raises:
            NoMatchError: A pattern matches nothing; the message lists the nearest names.
        """
        hits: set[str] = set()
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            found = {row.name for row in self.rows if fnmatchcase(row.name, pattern)}
            if not found:
                found = {self[pattern].name}
            hits |= found
        return [row for row in self.rows if row.name in hits]

    def _find(self, name: str) -> Activation | None:
        short = canonical(name)
        for key in (name, short, short.replace("-self-", "-")):
            if key in self._by_name:
                return self._by_name[key]
        return self._by_module.get(name)

    @cached_property
    def _by_name(self) -> dict[str, Activation]:
        return {row.name: row for row in self.rows}

    @cached_property
    def _by_module(self) -> dict[str, Activation]:
        found: dict[str, Activation] = {}
        for row in self.rows:
            if not row.derived:
                found.setdefault(row.site.module + ("" if row.site.at != "input" else ":input"), row)
        return found


def inventory(
    model: DiffusionModel | nn.Module, *, size: tuple[int, int] | None = None, num_text: int | None = None
) -> Inventory:
    """Lists every inner activation of a backbone, with shape, grid and cumulative cost.

    Args:
        model: A diffusion model, or a backbone of the diffusers library, which may be on the meta device.
        size: Height and width of x_t; by default what the backbone was trained for.
        num_text: Number of text tokens; by default what is usual for the class. It changes the shares of cost alone.

    Raises:
        IncompatibleModelError: The backbone is compiled, or its class is unknown; `inventory_of_network` lists any
            network.

    Example:
        >>> from diffcore.testing import tiny
        >>> found = inventory(tiny.model("sdxl"))
        >>> len(found.paper), found["mid-vit-out"].channels, found["mid-vit-out"].grid
        (89, 64, (4, 4))
    """
    backbone = model.backbone if isinstance(model, DiffusionModel) else model
    require_hookable(backbone)
    kind = type(backbone).__name__
    if kind not in BACKBONES:
        raise IncompatibleModelError(
            f"{printable(kind)} is a backbone of unknown kind; known are {', '.join(BACKBONES)}; "
            "`inventory_of_network` lists any network that you can call"
        )
    known = BACKBONES[kind]
    table = site_table(backbone, size=size, cond=known.num_text if num_text is None else num_text)
    size = size or latent_shape(backbone)[1:]
    return Inventory(tuple(named_rows(backbone, table, size)), size, table.flops, kind)


def inventory_of_config(
    config: Mapping[str, Any], *, size: tuple[int, int] | None = None, num_text: int | None = None
) -> Inventory:
    """Lists the activations of the backbone that a configuration describes; no weights are made.

    Args:
        config: Content of a backbone's `config.json`, with its `_class_name`.
        size: Height and width of x_t; by default what the backbone is trained for.
        num_text: Number of text tokens; by default what is usual for the class.

    Raises:
        IncompatibleModelError: The class is unknown, or the configuration builds no backbone.
    """
    return inventory(meta_backbone(config), size=size, num_text=num_text)


def meta_backbone(config: Mapping[str, Any]) -> nn.Module:
    """Returns the backbone that a configuration describes, on the meta device.

    Args:
        config: Content of a backbone's `config.json`, with its `_class_name`.

    Raises:
        IncompatibleModelError: The class is unknown, or the configuration builds no backbone.
    """
    name = current_class(str(config.get("_class_name", "")), config)
    if name not in BACKBONES:
        raise IncompatibleModelError(
            f"{printable(name) or 'nothing'} is no backbone that is known; known are {', '.join(BACKBONES)}"
        )
    kind = library_class(name)
    taken = inspect.signature(kind.__init__).parameters
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return kind(**{key: value for key, value in config.items() if key in taken})
    except Exception as error:  # whatever the library makes of impossible settings
        raise IncompatibleModelError(f"the configuration does not build {name}: {printable(error)}") from error


def inventory_of_network(
    network: nn.Module, forward: Callable[[nn.Module], object], *, size: tuple[int, int], num_text: int = 0
) -> Inventory:
    """Lists the tensors inside a network of any class, under the dotted names of its modules.

    Listed are outputs of modules that run once in a pass; a tensor that several modules return is listed once.

    Args:
        network: The network; it is neither changed nor run.
        forward: Runs its argument, a copy of the network on the meta device, on inputs of one row on the meta device.
        size: Height and width of the sample, by which grids of places are known.
        num_text: Number of text tokens in the inputs; a sequence of this length is taken for text.

    Example:
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, stride=2, padding=1), torch.nn.Conv2d(8, 4, 1))
        >>> x = torch.empty(1, 3, 16, 16, device="meta")
        >>> [(row.name, row.channels, row.grid) for row in inventory_of_network(network, lambda n: n(x), size=(16, 16))]
        [('0', 8, (8, 8)), ('1', 4, (8, 8))]
    """
    table = trace_sites(network, forward, size=size, num_text=num_text)
    rows = [
        Activation(
            name=row.name,
            site=row.site,
            kind=row.kind,
            stage="",
            axes=row.axes,
            shape=row.shape or (),
            channels=row.channels or 0,
            grid=row.grid,
            num_text=row.num_text,
            flops=row.flops,
            cost=row.cost,
        )
        for row in table
        if row.calls == 1 and row.site.at != "input" and row.site.module and row.same_as is None and row.axes
    ]
    return Inventory(tuple(rows), size, table.flops, type(network).__name__)
