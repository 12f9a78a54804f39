"""Measures trained models: Fréchet distance against solver steps and against samples seen."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffcore.data import ImageSet
from diffcore.denoiser import NetworkDenoiser, Solver, sample
from diffcore.metrics import Estimate, frechet_distance_from_features, real_floor
from diffcore.noise import row_noise
from immiscible_noise.classifier import TrainedClassifier, classify
from immiscible_noise.train import Recipe

_SAMPLING_STREAM, _LABEL_STREAM = 104, 105
_COMPONENTS = 32


@dataclass(frozen=True)
class Score:
    """One model, sampled with one number of steps.

    Attributes:
        arm: Name of the arm.
        seed: Of the training.
        step: Training steps behind the weights.
        samples_seen: Training images behind the weights, repetitions counted.
        sampling_steps: Solver steps.
        eta: Share of fresh noise in sampling; 0 is deterministic.
        frechet: Distance to the real images, in features named in the report.
        accuracy: Share of samples that the classifier takes for the label asked for; None if unconditional.
    """

    arm: str
    seed: int
    step: int
    samples_seen: int
    sampling_steps: int
    eta: float
    frechet: float
    accuracy: float | None


class Evaluator:
    """Compares samples with one set of real images; the real side is computed once.

    Args:
        images: The real images.
        classifier: Gives the features; without one, the leading principal components of the pixels are used.
        device: Where to compute.
        num_samples: Samples per score.
        batch_size: Samples per forward pass.
    """

    def __init__(
        self,
        images: ImageSet,
        classifier: TrainedClassifier | None,
        *,
        device: torch.device | str = "cpu",
        num_samples: int = 3000,
        batch_size: int = 1000,
    ) -> None:
        self.device, self.num_samples, self.batch_size = torch.device(device), num_samples, batch_size
        self.classifier = classifier
        self.labels = images.labels
        real = images.unit().to(self.device)
        self._axes = None if classifier else _principal_axes(real)
        self.real = torch.cat([self.features(chunk) for chunk in real.split(batch_size)])

    @property
    def description(self) -> str:
        """The features, in words."""
        return (
            self.classifier.description
            if self.classifier
            else f"{self.real.shape[1]} principal components of the pixels"
        )

    def features(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 32"]:
        """Returns the features of images in [0, 1]."""
        if self.classifier is not None:
            return self.classifier.network.features(images)
        mean, axes = self._axes  # pyright: ignore[reportGeneralTypeIssues]
        return (images.flatten(1) - mean) @ axes

    def floor(self) -> Estimate:
        """Returns the real-versus-real distance: what a perfect model would score at equal size."""
        return real_floor(self.real, self.num_samples)

    def score(
        self,
        denoiser: NetworkDenoiser,
        recipe: Recipe,
        step: int,
        sampling_steps: int,
        *,
        solver: Solver = "euler",
        eta: float = 0.0,
    ) -> Score:
        """Samples and measures. The sampling noise depends on the row alone: all arms and seeds start from the same."""
        labels = self._asked_labels() if recipe.num_classes is not None else None
        generated = generate(
            denoiser,
            recipe,
            self.num_samples,
            sampling_steps,
            labels=labels,
            solver=solver,
            eta=eta,
            batch_size=self.batch_size,
        )
        features = torch.cat([self.features(chunk) for chunk in generated.split(self.batch_size)])
        accuracy = None
        if labels is not None and self.classifier is not None:
            accuracy = float((classify(self.classifier.network, generated).cpu() == labels).float().mean())
        return Score(
            arm=recipe.arm.name,
            seed=recipe.seed,
            step=step,
            samples_seen=step * recipe.settings.batch_size,
            sampling_steps=sampling_steps,
            eta=eta,
            frechet=float(frechet_distance_from_features(self.real, features)),
            accuracy=accuracy,
        )

    def _asked_labels(self) -> Tensor:
        """Labels in the proportions of the real images."""
        assert self.labels is not None  # a class-conditional recipe was trained on labels
        generator = torch.Generator().manual_seed(_LABEL_STREAM)
        order = torch.randperm(len(self.labels), generator=generator)
        return self.labels[order.repeat(-(-self.num_samples // len(order)))[: self.num_samples]]


@torch.no_grad()
def generate(
    denoiser: NetworkDenoiser,
    recipe: Recipe,
    count: int,
    sampling_steps: int,
    *,
    labels: Tensor | None = None,
    solver: Solver = "euler",
    eta: float = 0.0,
    batch_size: int = 1000,
) -> Float[Tensor, "count c h w"]:
    """Returns images in [0, 1], row i from noise i, whatever the batch size.

    Args:
        denoiser: The trained model.
        recipe: Its recipe.
        count: Number of images.
        sampling_steps: Solver steps.
        labels: One per image, for a class-conditional model.
        solver: "euler", "heun" or "ddim".
        eta: Share of fresh noise; only with "ddim".
        batch_size: Images per forward pass.
    """
    device = next(denoiser.parameters()).device
    images = []
    for rows in torch.arange(count).split(batch_size):
        noise = row_noise(0, rows, recipe.shape, stream=_SAMPLING_STREAM, device=device)
        condition = {} if labels is None else {"class_labels": labels[rows].to(device)}
        x0 = sample(
            denoiser,
            noise,
            condition,
            steps=sampling_steps,
            solver="ddim" if eta else solver,
            eta=eta,
            seeds=rows.to(device) if eta else None,
            clip_x0=recipe.clip_x0,
        )
        images.append(recipe.scale.decode(x0))
    return torch.cat(images)


def as_rows(scores: Sequence[Score]) -> list[dict[str, object]]:
    """Returns the scores as table rows."""
    return [asdict(score) for score in scores]


def _principal_axes(images: Float[Tensor, "n c h w"]) -> tuple[Tensor, Tensor]:
    """Returns the mean and the leading directions, by randomised subspace iteration from a fixed seed."""
    flat = images.flatten(1)
    mean = flat.mean(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, _, axes = torch.svd_lowrank(flat - mean, q=min(_COMPONENTS, *flat.shape), niter=4)
    return mean, axes
