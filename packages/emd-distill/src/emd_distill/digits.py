"""A small teacher of handwritten digits, on which the whole method runs in a minute.

A residual network on the 64 numbers of an 8 x 8 image, class-conditional, with EDM's preconditioning; it ships with the
package. Its generators are measured against the 1797 real digits: Fréchet distance on pixels, accuracy of a classifier,
precision, recall and coverage with five neighbours.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.resources import as_file, files
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from diffcore.denoiser import Condition, Denoiser, EDMSchedule, NetworkDenoiser, sample
from diffcore.io import artifact
from diffcore.io.shipped import shipped_folder
from diffcore.metrics.attribute_network import AttributeNetwork, load_attribute_network
from diffcore.metrics.frechet import frechet_distance_from_features
from diffcore.metrics.precision_recall import precision_recall
from diffcore.noise import philox_normal
from diffcore.train.timesteps import log_normal_sigmas
from diffcore.zoo.digits.data import load_digits
from emd_distill.distill import student_loss
from emd_distill.draws import Draws

SHAPE = (1, 8, 8)
SCHEMA = "emd-distill/digits-teacher@1"
GENERATOR_SIGMA = 2.5
"""Noise level at which the teacher becomes a one-step generator."""
_SIGMA_DATA, _WIDTH, _BLOCKS = 0.5, 224, 3
_STEPS, _BATCH = 12_000, 128
_EVALUATED, _NEIGHBOURS = 1790, 5
_SEED = 9  # of the latents that are measured


class DigitsNetwork(nn.Module):
    """A residual network on flat images, with noise level and class added in each block.

    Args:
        width: Number of hidden units.
        blocks: Number of residual blocks.
    """

    frequencies: Tensor

    def __init__(self, width: int = _WIDTH, blocks: int = _BLOCKS) -> None:
        super().__init__()
        self.into = nn.Linear(math.prod(SHAPE), width)
        self.classes = nn.Embedding(10, width)
        self.level = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.first = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.second = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.out = nn.Linear(width, math.prod(SHAPE))
        self.register_buffer("frequencies", 3 * torch.linspace(math.log(0.5), math.log(8), 8).exp())

    def forward(
        self, x: Float[Tensor, "b 1 8 8"], t: Float[Tensor, " b"], class_labels: Int[Tensor, " b"]
    ) -> Float[Tensor, "b 1 8 8"]:
        """Returns the network's output for scaled images, log(sigma) / 4 and classes.

        Args:
            x: Noisy images times c_in.
            t: c_noise of each image.
            class_labels: Digit of each image.
        """
        phase = t[:, None] * self.frequencies
        added = self.level(torch.cat([phase.sin(), phase.cos()], 1)) + self.classes(class_labels)
        h = self.into(x.flatten(1)) + added
        for norm, first, second in zip(self.norms, self.first, self.second, strict=True):
            h = h + second(F.silu(first(norm(h) + added)))
        return self.out(F.silu(h)).view_as(x)


def digits_denoiser(seed: int = 0) -> NetworkDenoiser:
    """Returns a denoiser of digits with random weights.

    Args:
        seed: Seed of the weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = DigitsNetwork()
    return NetworkDenoiser(backbone, EDMSchedule(sigma_data=_SIGMA_DATA), "edm", sigma_data=_SIGMA_DATA)


def load_teacher() -> NetworkDenoiser:
    """Returns the teacher that ships with the package, whose weights do not learn.

    Example:
        >>> teacher = load_teacher()
        >>> teacher(torch.zeros(1, *SHAPE), torch.ones(1), digit_classes(0, torch.tensor([7]))).x0.shape
        torch.Size([1, 1, 8, 8])
    """
    with as_file(files("emd_distill") / "digits_teacher") as folder:
        stored = artifact.load(folder / "teacher.safetensors", schema=SCHEMA)
    teacher = digits_denoiser()
    teacher.backbone.load_state_dict({name: value.float() for name, value in stored.tensors.items()})
    return teacher.requires_grad_(False).eval()


def train_teacher(
    *, steps: int = _STEPS, seed: int = 0, track: Callable[[range], Any] = lambda steps: steps
) -> NetworkDenoiser:
    """Trains the teacher that ships with the package: about two minutes of one core.

    Args:
        steps: Number of steps, each on 128 digits.
        seed: Seed of weights, order and noise.
        track: Goes through the steps, for a progress bar.

    Example:
        >>> train_teacher(steps=2).prediction_type
        'edm'
    """
    images, labels = load_digits()
    x0, teacher = 2 * images - 1, digits_denoiser(seed)
    average = copy.deepcopy(teacher)
    optimizer = torch.optim.Adam(teacher.parameters(), 2e-3)
    draws, rows = Draws(seed, SHAPE, log_normal_sigmas(-1.0, 1.2)), torch.arange(_BATCH)
    generator = torch.Generator().manual_seed(seed)
    for step in track(range(steps)):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, step / 200) * max(0.02, 1 - step / steps)
        chosen = torch.randint(0, len(x0), (_BATCH,), generator=generator)
        drawn = draws(step, rows)
        loss = student_loss(teacher, x0[chosen], replace(drawn, condition={"class_labels": labels[chosen]}))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            own: list[Tensor] = list(average.parameters())
            others: list[Tensor] = list(teacher.parameters())
            torch._foreach_lerp_(own, others, max(0.002, 1 / (step + 1)))
    return average.requires_grad_(False).eval()


def save_teacher(teacher: NetworkDenoiser, path: Any) -> None:
    """Writes a teacher in half precision, as the package ships it.

    Args:
        teacher: Teacher after its training.
        path: File that ends in .safetensors.
    """
    tensors = {name: value.half() for name, value in teacher.backbone.state_dict().items()}
    artifact.save(path, tensors, schema=SCHEMA, steps=_STEPS, batch_size=_BATCH, recipe="digits.train_teacher")


def digit_classes(step: int, rows: Int[Tensor, " b"]) -> Condition:
    """Returns the classes of an iteration: all ten in turn, whatever the rows of a process.

    Args:
        step: Number of finished iterations.
        rows: Places of the rows in the whole batch.
    """
    return {"class_labels": (rows + step) % 10}


@dataclass(frozen=True)
class Quality:
    """How near a generator's digits are to real ones.

    Attributes:
        distance: Fréchet distance on pixels in [-1, 1]; that of one half of the real digits to the other is .28.
        accuracy: Share that a classifier takes for the digit that was asked for.
        precision: Share of generated digits near a real one.
        recall: Share of real digits near a generated one, which falls when modes are lost.
        coverage: Share of real digits with a generated one among their neighbours.
        worst_spread: Smallest spread of a class relative to that of the real one; 0 where all its digits are equal.
    """

    distance: float
    accuracy: float
    precision: float
    recall: float
    coverage: float
    worst_spread: float

    def to_json(self) -> dict[str, float]:
        """Returns the measures as plain values."""
        return asdict(self)


def evaluated_latents(count: int = _EVALUATED) -> tuple[Float[Tensor, "n 1 8 8"], Condition]:
    """Returns the latents and classes that generators are measured on.

    Args:
        count: Number of digits to measure.
    """
    rows = torch.arange(count)
    return philox_normal(_SEED, rows, SHAPE), {"class_labels": rows % 10}


@torch.no_grad()
def measure(x: Float[Tensor, "n 1 8 8"], labels: Int[Tensor, " n"], judge: AttributeNetwork) -> Quality:
    """Returns how near digits are to the real ones.

    Args:
        x: Generated digits in [-1, 1].
        labels: Digit that each was asked to be.
        judge: Classifier of images in [0, 1] that reads the digit; see `load_judge`.
    """
    images, real_labels = load_digits()
    real, fake = (2 * images - 1).flatten(1), x.flatten(1).float()
    scores = precision_recall(real, fake, k=_NEIGHBOURS, k_coverage=_NEIGHBOURS)
    answers = judge.read((x / 2 + 0.5).clamp(0, 1))["digit"]
    spreads = [
        float(fake[labels == digit].std(0).mean() / real[real_labels == digit].std(0).mean()) for digit in range(10)
    ]
    return Quality(
        float(frechet_distance_from_features(real, fake)),
        float((answers == labels).float().mean()),
        float(scores.precision),
        float(scores.recall),
        float(scores.coverage),
        min(spreads),
    )


def load_judge() -> AttributeNetwork:
    """Returns the classifier of digits that comes with diffcore.

    Example:
        >>> load_judge().read(torch.zeros(2, 1, 8, 8))["digit"].shape
        torch.Size([2])
    """
    return load_attribute_network(shipped_folder("digits8-classifier"))


@torch.no_grad()
def teacher_samples(teacher: Denoiser, z: Float[Tensor, "n 1 8 8"], condition: Condition, steps: int = 18) -> Tensor:
    """Returns what the teacher draws in many steps from the same latents.

    Args:
        teacher: Denoiser of the teacher of digits.
        z: Latents of the rows, standard normal.
        condition: Classes of the rows.
        steps: Number of steps of Heun's method.
    """
    schedule = EDMSchedule(0.02, 20.0, sigma_data=_SIGMA_DATA)
    return sample(teacher, z, condition, timesteps=schedule.timesteps(steps), solver="heun")
