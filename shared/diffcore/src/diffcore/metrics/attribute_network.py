"""A small network that reads attributes off small images, and whose last hidden layer serves as features.

Trained on data whose attributes are known exactly, it classifies the attributes of generated images. The shipped ones
are loaded by name: `zoo:portraits-oracle`, `zoo:digits8-classifier`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from diffcore.errors import CorruptArtifactError, printable
from diffcore.io.files import make_folder
from diffcore.io.jsonfile import read_trusted, write_json

_SCHEMA = "diffcore/attribute-network@1"


@dataclass(frozen=True)
class AttributeNetworkConfig:
    """Sizes of an `AttributeNetwork`, and the classes it tells apart.

    Attributes:
        size: Side of the images in pixels; other sizes are averaged down to it.
        channels: Number of image channels: 1 for grey, 3 for colour.
        widths: Channels of each block; every block but the first halves the side.
        num_features: Length of a row of features.
        classes: Names of the classes of each attribute.
    """

    size: int
    channels: int
    widths: tuple[int, ...]
    num_features: int
    classes: Mapping[str, tuple[str, ...]]


class AttributeNetwork(nn.Module):
    """Convolutions, one hidden layer, one linear head per attribute.

    Args:
        config: Sizes of the layers and names of the classes.
    """

    def __init__(self, config: AttributeNetworkConfig) -> None:
        super().__init__()
        self.config = config
        sizes = (config.channels, *config.widths)
        blocks = [_block(a, b, 1 if i == 0 else 2) for i, (a, b) in enumerate(pairwise(sizes))]
        self.blocks = nn.Sequential(*blocks)
        side = config.size // 2 ** (len(config.widths) - 1)
        self.hidden = nn.Linear(config.widths[-1] * side**2, config.num_features)
        self.heads = nn.ModuleDict({name: nn.Linear(config.num_features, len(v)) for name, v in config.classes.items()})

    def forward(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b d"]:
        """Returns features of images in [0, 1]."""
        size = self.config.size
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="area")
        return F.relu(self.hidden(self.blocks(images * 2 - 1).flatten(1)))

    def logits(self, images: Float[Tensor, "b c height width"]) -> dict[str, Float[Tensor, "b classes"]]:
        """Returns one row of logits per image and attribute."""
        features = self(images)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def read(self, images: Float[Tensor, "b c height width"]) -> dict[str, Tensor]:
        """Returns the class number of each attribute for each image; any number of images."""
        chunks = [self.logits(chunk) for chunk in images.split(500)]
        return {name: torch.cat([chunk[name] for chunk in chunks]).argmax(1) for name in self.heads}

    @torch.no_grad()
    def features(self, images: Float[Tensor, "b c height width"]) -> Float[Tensor, "b d"]:
        """Returns features of any number of images."""
        return torch.cat([self(chunk) for chunk in images.split(500)])

    def save(self, folder: Path) -> None:
        """Writes `config.json` and the weights in float16."""
        make_folder(folder)
        write_json(folder / "config.json", {"schema": _SCHEMA, **asdict(self.config)})
        weights = {k: v.half() if v.is_floating_point() else v for k, v in self.state_dict().items()}
        save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors")


def load_attribute_network(folder: Path) -> AttributeNetwork:
    """Reads a network that `AttributeNetwork.save` wrote, in float32 and evaluation mode.

    Raises:
        CorruptArtifactError: The folder does not hold one.
    """
    config = read_trusted(folder / "config.json")
    if config.pop("schema", None) != _SCHEMA:
        raise CorruptArtifactError(f"{printable(folder, 300)} holds no attribute network; point to another folder")
    network = AttributeNetwork(
        AttributeNetworkConfig(
            size=int(config["size"]),
            channels=int(config["channels"]),
            widths=tuple(config["widths"]),
            num_features=int(config["num_features"]),
            classes={name: tuple(values) for name, values in config["classes"].items()},
        )
    )
    weights = load_file(folder / "model.safetensors")
    network.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in weights.items()})
    return network.eval().requires_grad_(False)


def _block(channels: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, stride, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    )
