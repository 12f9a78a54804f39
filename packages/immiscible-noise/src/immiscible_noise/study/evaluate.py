"""Measures trained models: Fréchet distance against solver steps and against samples seen."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffcore.batching import InBatches
from diffcore.data import ImageSet
from diffcore.denoiser import Denoiser
from diffcore.metrics import Estimate, FeatureExtractor, frechet_distance_from_features, real_floor
from immiscible_noise.study.classifier import TrainedClassifier, classify
from immiscible_noise.study.recipe import AnyRecipe
from immiscible_noise.study.settings import EvaluationSettings

_LABEL_STREAM = 105
_COMPONENTS = 32


@dataclass(frozen=True)
class Score:
    """One model, sampled with one number of steps.

    Attributes:
        coupling: Name of the coupling that the model was trained with.
        seed: Seed of the training.
        step: Number of training steps behind the weights.
        samples_seen: Number of training images behind the weights, repetitions counted.
        sampling_steps: Number of solver steps.
        eta: Share of fresh noise in sampling; 0 is deterministic.
        frechet: Distance to the real images, in features named in the report.
        accuracy: Share of samples that the classifier takes for the label of the image whose condition was asked for;
            None if unconditional.
    """

    coupling: str
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
        images: Real images, with labels for class-conditional models.
        classifier: Network that gives the features; without one, leading principal components of the pixels are used.
        evaluation: Number of samples, of solver steps, and of samples per forward pass.
        device: Device on which everything is computed.
        extractor: Network that gives the features in place of the classifier's, on the device.
        has_codec: Whether the models that are measured decode their samples, which takes more time and memory.
    """

    def __init__(
        self,
        images: ImageSet,
        classifier: TrainedClassifier | None,
        evaluation: EvaluationSettings,
        device: torch.device,
        *,
        extractor: FeatureExtractor | None = None,
        has_codec: bool = False,
    ) -> None:
        self.classifier, self.extractor, self.evaluation, self.device = classifier, extractor, evaluation, device
        self.num_samples = evaluation.num_samples or (500 if has_codec else 3000)
        self.in_batches = InBatches(evaluation.sampling_batch or (16 if has_codec else 1000))
        self.images = images
        self._axes = None if classifier or extractor else _principal_axes(images.unit().to(device))
        self.real = torch.cat([*self.in_batches(images.images, lambda batch: self.features(batch.to(device) / 255))])

    @property
    def description(self) -> str:
        """The features, in words."""
        if self.extractor is not None:
            return f"{self.extractor.name}, {self.real.shape[1]} features"
        if self.classifier is None:
            return f"{self.real.shape[1]} principal components of the pixels"
        return self.classifier.description

    def features(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b features"]:
        """Returns the features of images in [0, 1]."""
        if self.extractor is not None:
            return self.extractor(images.expand(-1, 3, -1, -1))
        if self.classifier is not None:
            return self.classifier.network.features(images)
        mean, axes = self._axes  # pyright: ignore[reportGeneralTypeIssues]
        return (images.flatten(1) - mean) @ axes

    def floor(self) -> Estimate:
        """Returns the real-versus-real distance: what a perfect model would score at equal size."""
        return real_floor(self.real, self.num_samples)

    def scores(self, denoiser: Denoiser, recipe: AnyRecipe, step: int) -> list[Score]:
        """Returns a score for each number of sampling steps; arguments as in `score`."""
        settings = self.evaluation
        numbers = settings.steps_for(recipe.settings)
        return [self.score(denoiser, recipe, step, steps, eta=settings.eta) for steps in numbers]

    def score(self, denoiser: Denoiser, recipe: AnyRecipe, step: int, sampling_steps: int, *, eta: float) -> Score:
        """Samples and measures. The sampling noise depends on the row alone: all models start from the same.

        Args:
            denoiser: Trained model that generates.
            recipe: How the model was trained.
            step: Number of training steps behind its weights.
            sampling_steps: Number of solver steps.
            eta: Share of fresh noise in each solver step.
        """
        count, conditions = self.num_samples, recipe.conditions_of(self.images)
        # In the proportions of the real images.
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(_LABEL_STREAM))
        order = order.repeat(-(-count // len(order)))[:count]

        def images_of(rows: Tensor) -> Tensor:
            asked = None if conditions is None else conditions[order[rows]]
            return recipe.generate(
                denoiser, rows, asked, steps=sampling_steps, eta=eta, guidance=self.evaluation.guidance
            )

        generated = torch.cat([*self.in_batches(torch.arange(count), images_of)])
        features = torch.cat([*self.in_batches(generated, self.features)])
        accuracy = None
        if conditions is not None and self.classifier is not None and self.images.labels is not None:
            found = classify(self.classifier.network, generated).cpu()
            accuracy = float((found == self.images.labels[order]).float().mean())
        return Score(
            coupling=recipe.coupling.name,
            seed=recipe.seed,
            step=step,
            samples_seen=step * recipe.settings.batch_size,
            sampling_steps=sampling_steps,
            eta=eta,
            frechet=float(frechet_distance_from_features(self.real, features)),
            accuracy=accuracy,
        )


def _principal_axes(images: Float[Tensor, "n c h w"]) -> tuple[Tensor, Tensor]:
    """Returns the mean and the leading directions, by randomised subspace iteration from a fixed seed."""
    flat = images.flatten(1)
    mean = flat.mean(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, _, axes = torch.svd_lowrank(flat - mean, q=min(_COMPONENTS, *flat.shape), niter=4)
    return mean, axes
