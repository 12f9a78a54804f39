"""A small classifier trained once on a data set's own labels: features for Fréchet distances, and label accuracy.

The distances it gives compare arms of one study on one data set. They are not comparable with published FIDs.
"""

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional

from diffcore.errors import UserError

_FEATURES = 32
_EPOCHS = 20
_BATCH = 128
_AUGMENTATION_NOISE = 0.05  # of the pixel range: real and generated pictures differ by such noise, classes do not


class Classifier(nn.Module):
    """Convolutions that halve the image down to 4x4, a 32-dimensional feature layer, and a head.

    Args:
        channels: Of the images.
        size: Side of the square images.
        num_classes: Number of labels.
    """

    def __init__(self, channels: int, size: int, num_classes: int) -> None:
        super().__init__()
        width = 16
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        while size > 4:
            layers += [nn.Conv2d(width, min(2 * width, 128), 3, stride=2, padding=1), nn.ReLU()]
            width, size = min(2 * width, 128), (size + 1) // 2
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * size * size, _FEATURES))
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(_FEATURES, num_classes))

    def features(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 32"]:
        """Returns the features of images in [0, 1], before their activation."""
        return self.trunk(2 * images - 1)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        """Returns logits for images in [0, 1]."""
        return self.head(self.features(images))


@dataclass(frozen=True)
class TrainedClassifier:
    """A classifier with what must be said beside every number it gives.

    Attributes:
        network: In eval mode.
        accuracy: On the held-out fifth of the images.
        sha256: Of the weights, first 12 hexadecimal digits.
    """

    network: Classifier
    accuracy: float
    sha256: str

    @property
    def description(self) -> str:
        """One line for tables and reports."""
        return f"classifier {self.sha256}, held-out accuracy {self.accuracy:.1%}, {_FEATURES} features"


def train_classifier(
    images: UInt8[Tensor, "n c h w"],
    labels: Int[Tensor, " n"],
    num_classes: int,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> TrainedClassifier:
    """Trains on four fifths of the images and measures the accuracy on the rest.

    Args:
        images: Square images.
        labels: From 0 to `num_classes` - 1.
        num_classes: Number of labels.
        seed: Fixes split, weights, order and augmentation.
        device: Where to train; the result stays there.

    Raises:
        UserError: There are too few images to hold some out.
    """
    if len(images) < 10:
        raise UserError(f"a classifier needs at least 10 labelled images, here are {len(images)}; give more images")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    held_out, kept = order[: len(order) // 5], order[len(order) // 5 :]
    pixels, targets = images.to(device).float() / 255, labels.to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Classifier(images.shape[1], images.shape[2], num_classes).to(device)
    steps = _EPOCHS * -(-len(kept) // _BATCH)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for _ in range(_EPOCHS):
        for rows in kept[torch.randperm(len(kept), generator=generator)].split(_BATCH):
            x = pixels[rows]
            x = x + _AUGMENTATION_NOISE * torch.randn(x.shape, generator=generator).to(x)
            loss = functional.cross_entropy(network(x), targets[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval().requires_grad_(False)
    accuracy = float((classify(network, pixels[held_out]) == targets[held_out]).float().mean())
    return TrainedClassifier(network, accuracy, weights_hash(network))


def classify(network: Classifier, images: Float[Tensor, "b c h w"]) -> Int[Tensor, " b"]:
    """Returns the most likely label of each image in [0, 1]."""
    return torch.cat([network(chunk).argmax(1) for chunk in images.split(1024)])


def weights_hash(network: nn.Module) -> str:
    """Returns the first 12 hexadecimal digits of the sha256 over names and values of all weights."""
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
