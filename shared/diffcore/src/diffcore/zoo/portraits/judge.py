"""The labels of portraits that the oracle is trained to read."""

import torch
from jaxtyping import Int
from torch import Tensor

from diffcore.metrics.attribute_network import AttributeNetwork, AttributeNetworkConfig
from diffcore.zoo.portraits.attributes import CLASSES
from diffcore.zoo.portraits.people import People, smile_class
from diffcore.zoo.portraits.pictures import SIZE


def labels_of(people: People) -> dict[str, Int[Tensor, " n"]]:
    """Returns the class number of each attribute."""
    return {name: smile_class(people) if name == "smile" else people[name] for name in CLASSES}


def build_portraits_oracle(seed: int = 0) -> AttributeNetwork:
    """Returns the untrained oracle: 32x32 images, ten attributes, 128 features."""
    torch.manual_seed(seed)
    config = AttributeNetworkConfig(size=SIZE, channels=3, widths=(24, 48, 64, 96), num_features=128, classes=CLASSES)
    return AttributeNetwork(config)
