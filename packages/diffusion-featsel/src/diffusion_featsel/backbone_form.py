"""The extractor in the forms that other libraries expect of a backbone: timm's list of maps, torchvision's named nodes.

timm orders maps from fine to coarse, counts them from 0, and describes them in `feature_info`: channels, reduction
(pixels of the input per place), and the module. Segmentation heads and detectors that take a timm backbone take this.
torchvision's own extractor traces a model's graph, which fails on the U-Nets of diffusers: only its form is kept.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from diffcore.errors import UserError
from diffcore.models import DiffusionModel
from diffusion_featsel.activation import Activation
from diffusion_featsel.extractor import FeatureExtractor
from diffusion_featsel.prepare import prepare
from diffusion_featsel.protocol import multiple_of

Which = int | Sequence[int] | None


class FeatureInfo:
    """What is known of the maps of a backbone, with the methods of timm's class of this name.

    Methods take the index of a map, several, or None for those in `out_indices`, and answer with a value or a list.

    Args:
        feature_info: One dictionary per map, from fine to coarse, with "num_chs", "reduction" and "module".
        out_indices: Indices of the maps that the backbone returns; negative ones count from the end.

    Raises:
        IndexError: An index is beyond the maps.

    Example:
        >>> rows = [{"num_chs": 32, "reduction": 2, "module": "up_blocks.1"}]
        >>> info = FeatureInfo([*rows, {"num_chs": 64, "reduction": 4, "module": "mid_block"}], (-1,))
        >>> info.channels(), info.reduction(0), info.module_name([0, 1])
        ([64], 2, ['up_blocks.1', 'mid_block'])
    """

    def __init__(self, feature_info: Sequence[Mapping[str, Any]], out_indices: Sequence[int]) -> None:
        self.info = [{"index": place, **row} for place, row in enumerate(feature_info)]
        self.out_indices = tuple(_checked(index, len(self.info)) for index in out_indices)

    def from_other(self, out_indices: Sequence[int]) -> "FeatureInfo":
        """Returns the same maps with other indices returned."""
        return FeatureInfo(self.info, out_indices)

    def get(self, key: str, idx: Which = None) -> Any:
        """Returns one entry of maps: a value for one index, a list otherwise."""
        if idx is None:
            return [self.info[place][key] for place in self.out_indices]
        if isinstance(idx, int):
            return self.info[idx][key]
        return [self.info[place][key] for place in idx]

    def get_dicts(self, keys: Sequence[str] | None = None, idx: Which = None) -> Any:
        """Returns some or all entries of maps: a dictionary for one index, a list of them otherwise."""
        if isinstance(idx, int):
            row = self.info[idx]
            return dict(row) if keys is None else {key: row[key] for key in keys}
        return [self.get_dicts(keys, place) for place in (self.out_indices if idx is None else idx)]

    def channels(self, idx: Which = None) -> Any:
        """Returns numbers of channels."""
        return self.get("num_chs", idx)

    def reduction(self, idx: Which = None) -> Any:
        """Returns numbers of input pixels per place."""
        return self.get("reduction", idx)

    def module_name(self, idx: Which = None) -> Any:
        """Returns dotted names of modules in the network."""
        return self.get("module", idx)

    def __getitem__(self, item: int) -> dict[str, Any]:
        return self.info[item]

    def __len__(self) -> int:
        return len(self.info)


class Backbone(nn.Module):
    """An extractor that answers as a timm backbone with `features_only` does: a list of maps, from fine to coarse.

    Inputs keep their own size, so that `reduction` holds for each of them; values are in [0, 1].

    Args:
        extractor: The extractor whose activations are the maps.
        out_indices: Indices of the maps that are returned, negative ones from the end; by default all. The network runs
            up to the last one of these.

    Attributes:
        feature_info: Channels, reduction and module of all maps; see `FeatureInfo`.
        default_cfg: The size and the normalisation of inputs, under timm's names.

    Example:
        >>> import torch
        >>> from diffcore.models import from_pipeline
        >>> from diffcore.testing import tiny
        >>> names = ["mid-vit-out", "up-level0-upsampler-out"]
        >>> backbone = FeatureExtractor(from_pipeline(tiny.pipeline("sd15")), names).as_backbone()
        >>> backbone.feature_info.channels(), backbone.feature_info.reduction()
        ([64, 64], [2, 4])
        >>> [tuple(maps.shape) for maps in backbone(torch.rand(1, 3, 32, 16))]
        [(1, 64, 16, 8), (1, 64, 8, 4)]
    """

    output_fmt = "NCHW"

    def __init__(self, extractor: FeatureExtractor, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        rows = {row.name: row for row in extractor.activations()}
        side = extractor.usual_size[0]
        names = sorted(extractor.names, key=lambda name: _reduction(rows[name.partition("@")[0]], side))
        self.feature_info = FeatureInfo(
            [_described(name, rows[name.partition("@")[0]], extractor.channels(name), side) for name in names],
            range(len(names)) if out_indices is None else out_indices,
        )
        self._returned = [names[index] for index in self.feature_info.out_indices]
        self.extractor = extractor.only([name.partition("@")[0] for name in self._returned])
        self.default_cfg = {
            "input_size": (3, *extractor.usual_size),
            "mean": (0.0, 0.0, 0.0),
            "std": (1.0, 1.0, 1.0),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
        }

    @property
    def out_indices(self) -> tuple[int, ...]:
        """Indices of the maps that are returned."""
        return self.feature_info.out_indices

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> list[Tensor]:
        """Returns the maps of images in [0, 1], whose sides the network must divide; see `multiple_of`.

        Raises:
            UserError: A side is no multiple.
        """
        model = self.extractor.model
        ready = prepare(x, None, multiple=multiple_of(model, "native"))
        found = self.extractor.features(self.extractor.latents(ready))
        return [found[name] for name in self._returned]


class NodeExtractor(nn.Module):
    """An extractor whose maps have the user's own names, as torchvision's `create_feature_extractor` gives them.

    Args:
        extractor: The extractor of exactly these activations.
        return_nodes: The user's name of each activation, by the name that the extractor gives it.
    """

    def __init__(self, extractor: FeatureExtractor, return_nodes: Mapping[str, str]) -> None:
        super().__init__()
        self.extractor = extractor
        self.return_nodes = dict(return_nodes)

    def forward(self, x: Float[Tensor, "b 3 h w"]) -> dict[str, Tensor]:
        """Returns the maps of images in [0, 1] by the user's names."""
        found = self.extractor(x)
        return {mine: found[name] for name, mine in self.return_nodes.items()}


def create_feature_extractor(
    model: DiffusionModel, return_nodes: Mapping[str, str] | Sequence[str], **settings: Any
) -> NodeExtractor:
    """Returns a module that gives activations under the user's names, in the form of torchvision's function.

    Args:
        model: The diffusion model to look into.
        return_nodes: The user's name for each activation, or activations that keep the names given here: the paper's
            names, abbreviations of them, or dotted names of modules.
        **settings: Settings of the `FeatureExtractor`.

    Raises:
        NoMatchError: The network has no activation of a name.
        UserError: Several timesteps are asked for, or two names for one activation.

    Example:
        >>> import torch
        >>> from diffcore.models import from_pipeline
        >>> from diffcore.testing import tiny
        >>> model = from_pipeline(tiny.pipeline("sd15"))
        >>> body = create_feature_extractor(model, {"mid_block.attentions.0": "coarse", "up0-upsampler-out": "fine"})
        >>> {name: tuple(maps.shape) for name, maps in body(torch.rand(1, 3, 16, 16)).items()}
        {'coarse': (1, 64, 4, 4), 'fine': (1, 64, 8, 8)}
    """
    nodes = dict(return_nodes) if isinstance(return_nodes, Mapping) else {name: name for name in return_nodes}
    extractor = FeatureExtractor(model, list(nodes), **settings)
    if len(extractor.t) > 1:
        raise UserError(f"`t` names {len(extractor.t)} timesteps, and each node has one name; give one")
    if len(extractor.names) < len(nodes):
        raise UserError(f"`return_nodes` names an activation twice: {', '.join(nodes)}; name each once")
    return NodeExtractor(extractor, dict(zip(extractor.names, nodes.values(), strict=True)))


def _checked(index: int, count: int) -> int:
    if not -count <= index < count:
        raise IndexError(f"`out_indices` has {index}, and there are {count} maps, from 0 to {count - 1}")
    return index


def _reduction(row: Activation, side: int) -> int | float:
    rows = row.grid[0] if row.grid else 1
    return side // rows if side % rows == 0 else side / rows


def _described(name: str, row: Activation, channels: int, side: int) -> dict[str, Any]:
    return {"num_chs": channels, "reduction": _reduction(row, side), "module": row.site.module, "name": name}
