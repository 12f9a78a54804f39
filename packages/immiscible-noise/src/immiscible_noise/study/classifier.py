"""A small classifier trained once on a data set's own labels: features for Fréchet distances, and label accuracy.

The distances it gives compare models of one study on one data set. They are not comparable with published FIDs.
"""

import hashlib
import logging
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from diffcore.data import ImageSet
from diffcore.digests import add_tensors
from diffcore.errors import UserError
from diffcore.run import Run
from diffcore.runtime import Runtime

_LOG = logging.getLogger("diffcore.immiscible_noise")
_FEATURES = 32
_LEAST_LEARNT = 0.05  # accuracy above the most frequent label, below which features mean nothing
_LEAST_IMAGES = 10
_EPOCHS = 20
_BATCH = 128
_AUGMENTATION_NOISE = 0.05  # of the pixel range: real and generated images differ by such noise, classes do not


class Classifier(nn.Module):
    """Convolutions that halve the image down to 4x4, a 32-dimensional feature layer, and a head.

    Args:
        channels: Number of channels of the images.
        size: Side of the square images in pixels.
        num_classes: Number of different labels.
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
        network: The classifier, frozen and in evaluation mode.
        accuracy: Share of the held-out fifth of the images that it labels right.
        sha256: First 12 hexadecimal digits of the digest of the weights.
    """

    network: Classifier
    accuracy: float
    sha256: str

    @property
    def description(self) -> str:
        """One line for tables and reports."""
        return f"classifier {self.sha256}, held-out accuracy {self.accuracy:.1%}, {_FEATURES} features"


def train_classifier(images: ImageSet, *, device: torch.device | str = "cpu") -> TrainedClassifier:
    """Trains on four fifths of labelled images and measures the accuracy on the rest; the result stays on the device.

    Args:
        images: Square images with labels.
        device: Device of the training.

    Raises:
        UserError: There are too few images to hold some out, or they have no labels.
    """
    if len(images) < _LEAST_IMAGES or images.labels is None:
        raise UserError(
            f"a classifier needs at least {_LEAST_IMAGES} labelled images, not {len(images)}; give more, or labels"
        )
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(images), generator=generator)
    held_out, kept = order[: len(order) // 5], order[len(order) // 5 :]
    pixels, targets = images.unit().to(device), images.labels.to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = _network_for(images).to(device)
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
    return TrainedClassifier(network, accuracy, _weights_hash(network))


def classify(network: Classifier, images: Float[Tensor, "b c h w"]) -> Int[Tensor, " b"]:
    """Returns the most likely label of each image in [0, 1]."""
    return torch.cat([network(chunk).argmax(1) for chunk in images.split(1024)])


def _network_for(images: ImageSet) -> Classifier:
    _, channels, size, _ = images.images.shape
    return Classifier(channels, size, len(images.classes))


def _weights_hash(network: nn.Module) -> str:
    digest = hashlib.sha256()
    add_tensors(digest, network.state_dict())
    return digest.hexdigest()[:12]


def shared_classifier(images: ImageSet, run: Run, runtime: Runtime) -> TrainedClassifier | None:
    """Returns the study's feature extractor, trained once on the images' labels.

    None without labels, with too few images, and where the classifier learnt nothing from them.
    """
    if images.labels is None or len(images) < _LEAST_IMAGES:
        return None
    device = runtime.torch_device
    if run.missing(["classifier"]):
        trained = train_classifier(images, device=device)
        run.save("classifier", trained.network.state_dict(), accuracy=trained.accuracy, weights_sha256=trained.sha256)
    part = run.load("classifier")
    most_frequent = float(images.labels.bincount().max()) / len(images)
    if part.fields["accuracy"] < most_frequent + _LEAST_LEARNT:
        _LOG.warning(
            "the classifier reached a held-out accuracy of %.1f %%, the most frequent label has %.1f %%: its features "
            "mean nothing, distances are taken in principal components of the pixels",
            100 * part.fields["accuracy"],
            100 * most_frequent,
        )
        return None
    network = _network_for(images)
    network.load_state_dict(part.tensors)
    network.to(device).eval().requires_grad_(False)
    return TrainedClassifier(network, part.fields["accuracy"], part.fields["weights_sha256"])
