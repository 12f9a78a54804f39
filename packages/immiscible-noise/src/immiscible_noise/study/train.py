"""Trains one model on images with one coupling of noise and images, into a run folder that can be resumed."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffcore.data import ImageSet
from diffcore.denoiser import NetworkDenoiser, sample
from diffcore.errors import MachineError, UserError, printable
from diffcore.io import artifact
from diffcore.noise import mix_seed, philox_normal, row_noise
from diffcore.run import Run
from diffcore.runtime import Runtime
from diffcore.train import (
    EMA,
    ConsoleSummary,
    DenoisingModule,
    PairNoise,
    SampleGrid,
    Snapshots,
    StepData,
    StepSampler,
    fit,
    iterations_done,
    snapshot_key,
)
from immiscible_noise.consistency import (
    IMPROVED,
    ORIGINAL,
    consistency_sample,
    consistency_training_loss,
    sampling_levels,
)
from immiscible_noise.coupling import Coupling
from immiscible_noise.study.network import build_denoiser
from immiscible_noise.study.settings import TrainSettings

_LOG = logging.getLogger("diffcore.immiscible_noise")
# Streams of the run's seed, apart from those of the trainer: which rows are assigned, candidates, and samples.
_STREAMS = {"vanilla": 0, "assignment": 101, "knn": 102, "window": 107}
_GRID_STREAM, _SAMPLING_STREAM = 103, 104


@dataclass(frozen=True)
class PixelScale:
    """Maps images in [0, 1] to model space and back: `x0 = (images - mean) / std`."""

    mean: float = 0.5
    std: float = 0.5

    @classmethod
    def of(cls, images: ImageSet, normalisation: str) -> "PixelScale":
        """Returns the fixed map to [-1, 1], or the one to mean 0 and variance 1 over all pixels of the set."""
        if normalisation == "symmetric":
            return cls()
        pixels = images.images.double() / 255
        return cls(float(pixels.mean()), float(pixels.std().clamp(min=1e-3)))

    def encode(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Maps images to x0."""
        return (images - self.mean) / self.std

    def decode(self, x0: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Maps x0 to images, unclamped: where real pixels pile up at black, clamping would shift statistics."""
        return x0 * self.std + self.mean


@dataclass(frozen=True)
class Recipe:
    """All that is needed to build a trained model again around its weights.

    Attributes:
        coupling: How noise met images.
        settings: Objective, network and the rest, with `network` resolved.
        scale: Map from pixels to model space.
        shape: Channels, height and width of one image.
        num_classes: Number of labels of a class-conditional model, else None.
        sigma_data: Standard deviation of x0.
        seed: Number that fixed weights, order and noise.
    """

    coupling: Coupling
    settings: TrainSettings
    scale: PixelScale
    shape: tuple[int, int, int]
    num_classes: int | None
    sigma_data: float
    seed: int

    @property
    def clip_x0(self) -> float | None:
        """The largest |x0| that a pixel can have, which DDPM and DDIM clamp to; None for the other objectives."""
        if self.settings.objective != "ddpm":
            return None
        return max(self.scale.mean, 1 - self.scale.mean) / self.scale.std

    def denoiser(self) -> NetworkDenoiser:
        """Builds the untrained denoiser."""
        return build_denoiser(self.settings, self.shape, self.num_classes, self.sigma_data, self.seed)

    @torch.no_grad()
    def generate(
        self,
        denoiser: NetworkDenoiser,
        rows: Int[Tensor, " b"],
        labels: Int[Tensor, " b"] | None,
        *,
        steps: int,
        eta: float = 0.0,
        seed: int = 0,
        stream: int = _SAMPLING_STREAM,
    ) -> Float[Tensor, "b c h w"]:
        """Returns an image per row, from the row's own noise, whatever else is in the batch.

        Consistency functions are applied `steps` times, with fresh noise between; others take DDIM steps.

        Args:
            denoiser: Trained model, around whose weights the recipe was kept.
            rows: Numbers that choose the noises.
            labels: One label per row, for a class-conditional model.
            steps: Number of solver steps; without `eta` they are Euler's.
            eta: Share of fresh noise in each solver step.
            seed: Seed of all noises.
            stream: Number that keeps these noises apart from others of the seed.
        """
        device = next(denoiser.parameters()).device
        noise = row_noise(seed, rows, self.shape, stream=stream, device=device)
        cond = {} if labels is None else {"class_labels": labels.to(device)}
        if self.settings.consistency:
            x0 = consistency_sample(denoiser, noise, cond, sigmas=sampling_levels(steps), seeds=rows.to(device))
            return self.scale.decode(x0)
        x0 = sample(denoiser, noise, cond, steps=steps, eta=eta, seeds=rows.to(device), clip_x0=self.clip_x0)
        return self.scale.decode(x0)

    def some_labels(self, count: int) -> Int[Tensor, " count"] | None:
        """Returns each label in turn for a class-conditional model, else None."""
        return None if self.num_classes is None else torch.arange(count) % self.num_classes

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "Recipe":
        """Reads what `dataclasses.asdict` made of a recipe; earlier versions called the coupling "arm"."""
        return cls(
            coupling=Coupling(**fields.get("coupling", fields.get("arm"))),
            settings=TrainSettings(**fields["settings"]),
            scale=PixelScale(**fields["scale"]),
            shape=tuple(fields["shape"]),
            num_classes=fields["num_classes"],
            sigma_data=fields["sigma_data"],
            seed=fields["seed"],
        )


class Batches:
    """Batches of a set of images for the trainer: x0, positions and, for class-conditional training, labels."""

    def __init__(self, images: ImageSet, scale: PixelScale, class_conditional: bool) -> None:
        self.images, self.scale = images.images, scale
        self.labels = images.labels if class_conditional else None

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Int[Tensor, " b"]) -> dict[str, Any]:
        """Returns one batch."""
        batch: dict[str, Any] = {"x0": self.scale.encode(self.images[indices].float() / 255), "indices": indices}
        if self.labels is not None:
            batch["labels"] = self.labels[indices]
            batch["condition"] = {"class_labels": batch["labels"]}
        return batch


def train(
    images: ImageSet,
    run: Run,
    coupling: Coupling,
    settings: TrainSettings,
    runtime: Runtime,
) -> Recipe:
    """Trains a model and keeps its averaged weights at `settings.snapshot_steps`.

    A run that was interrupted continues from its last checkpoint; a finished one returns at once. Two runs with the
    same seed and different couplings share initial weights, data order and noise stream, so that they differ by the
    coupling alone.

    Args:
        images: Square images of one size, with labels if the training is class-conditional.
        run: Run folder that receives checkpoints, snapshots and the recipe.
        coupling: How noise meets images.
        settings: Objective, network and length of the training.
        runtime: Seed, device, precision and processes.

    Returns:
        The recipe, which `load_snapshot` turns into a denoiser.

    Raises:
        MachineError: The training stopped early, or its loss became NaN or infinite.
    """
    recipe = recipe_for(images, coupling, settings, runtime.seed)
    settings = recipe.settings
    missing = _missing_steps(run, settings)
    if not missing:
        return recipe
    _restart_before(missing[0], run)
    run.save("recipe", {}, **asdict(recipe))
    batches = Batches(images, recipe.scale, settings.class_conditional)
    module = _MODULES.get(settings.objective, DenoisingModule)(
        recipe.denoiser(),
        optimizer=partial(torch.optim.Adam, lr=settings.learning_rate, fused=True),
        pair_noise=pair_noise_of(coupling, runtime.seed, settings, batches),
        learning_rate_factor=(lambda step: min(1.0, (step + 1) / settings.warmup)) if settings.warmup else None,
        seed=runtime.seed,
    )
    ema = EMA(settings.ema_decay)
    callbacks = [
        ema,
        Snapshots(run, ema, settings.snapshot_steps, settings.batch_size, part="backbone"),
        SampleGrid(run, ema, partial(_grid, recipe), every=max(settings.steps // 4, 1)),
        ConsoleSummary(f"training {coupling.name}"),
    ]
    fit(
        module,
        StepData(batches, settings.batch_size, runtime.seed),
        steps=settings.steps,
        folder=run.folder,
        runtime=runtime,
        callbacks=callbacks,
        checkpoint_every=settings.checkpoint_every,
        gradient_clip=settings.gradient_clip or None,
    )
    if run.leading and _missing_steps(run, settings):  # a signal that whoever started us ignores can end the fit early
        raise MachineError("the training stopped before its last step; run the same command again to go on")
    return recipe


class ConsistencyModule(DenoisingModule):
    """Trains a consistency function as first published; noise is assigned once for both levels of a pair."""

    consistency = ORIGINAL

    def __init__(self, denoiser: NetworkDenoiser, **options: Any) -> None:
        super().__init__(denoiser, time_sampler=lambda u: u, **options)

    def loss(
        self,
        x0: Float[Tensor, "b *data"],
        noise: Float[Tensor, "b *data"],
        t: Float[Tensor, " b"],
        condition: Mapping[str, Tensor],
    ) -> Float[Tensor, ""]:
        """Returns the loss at the pairs of levels that the uniform numbers `t` draw at this iteration."""
        lower, upper = self.consistency.draw(t, self.iteration, self.num_iterations)
        return consistency_training_loss(self.denoiser, x0, noise, lower, upper, condition, settings=self.consistency)


class ImprovedConsistencyModule(ConsistencyModule):
    """Trains a consistency function with log-normal levels and weights (Song and Dhariwal 2023)."""

    consistency = IMPROVED


_MODULES: Mapping[str, Callable[..., DenoisingModule]] = {
    "consistency": ConsistencyModule,
    "consistency-improved": ImprovedConsistencyModule,
}


class WindowNoise:
    """Assigns noise over windows of the samples that a training will visit, whatever its batch size.

    Args:
        coupling: How noise meets the samples of a window.
        batches: Data set of the training.
        batch_size: Number of samples per step over all processes.
        seed: Seed of the training, which fixes its order.
    """

    def __init__(self, coupling: Coupling, batches: Batches, batch_size: int, seed: int) -> None:
        self.coupling, self.batches, self.batch_size, self.seed = coupling, batches, batch_size, seed
        self.order = StepSampler(len(batches), batch_size, seed)
        self._built: tuple[int, Tensor] | None = None

    def __call__(self, x0: Tensor, noise: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Returns the noise that the plan gives to this rank's share of a batch."""
        first = batch["step"] * self.batch_size + batch["rank"] * len(x0)
        rows = [
            self.window(visit // self.coupling.window, x0)[visit % self.coupling.window]
            for visit in range(first, first + len(x0))
        ]
        return torch.stack(rows)

    def window(self, number: int, like: Tensor) -> Tensor:
        """Returns the noises of a window's visits, in their order; the last window is kept."""
        if self._built is None or self._built[0] != number:
            size = self.coupling.window
            visits = torch.arange(number * size, (number + 1) * size)
            batch = self.batches.__getitems__(self.order.samples(int(visits[0]), int(visits[-1]) + 1))
            drawn = philox_normal(self.seed, visits, like.shape[1:], stream=_STREAMS["window"])
            step_seed = mix_seed(self.seed, number, _STREAMS["window"])
            found = self.coupling(
                batch["x0"], drawn, labels=batch.get("labels"), generator=torch.Generator().manual_seed(step_seed)
            )
            self._built = (number, found.to(like))
        return self._built[1]


def pair_noise_of(coupling: Coupling, seed: int, settings: TrainSettings, batches: Batches) -> PairNoise:
    """Returns the coupling as a hook of the training step.

    Whatever is drawn here is a function of (seed, step, rank), so that a resumed run repeats it.

    Args:
        coupling: How noise meets images.
        seed: Seed of the training.
        settings: Length and batch size of the training.
        batches: Data set of the training.
    """
    windows = WindowNoise(coupling, batches, settings.batch_size, seed) if coupling.window else None

    def pair(x0: Tensor, noise: Tensor, batch: Mapping[str, Any]) -> Tensor:
        if batch["step"] >= coupling.until * settings.steps:
            return noise
        if windows is not None:
            return windows(x0, noise, batch)
        step_seed = mix_seed(seed, batch["step"], _STREAMS[coupling.method])
        generator = torch.Generator(x0.device).manual_seed(mix_seed(step_seed, batch["rank"]))
        return coupling(x0, noise, labels=batch.get("labels"), mask=batch.get("mask"), generator=generator)

    return pair


def recipe_for(images: ImageSet, coupling: Coupling, settings: TrainSettings, seed: int) -> Recipe:
    """Fits the settings to a set of images: network, pixel scale, number of labels."""
    _, channels, height, width = images.images.shape
    settings = settings.for_image_size(height)
    scale = PixelScale.of(images, settings.normalisation)
    return Recipe(
        coupling=coupling,
        settings=settings,
        scale=scale,
        shape=(channels, height, width),
        num_classes=len(images.classes) if settings.class_conditional else None,
        sigma_data=float((images.images.double() / 255).std()) / scale.std,
        seed=seed,
    )


def read_recipe(training: Path) -> Recipe:
    """Reads the recipe of a training run from its folder, without opening the run.

    Raises:
        UserError: The folder is no training run.
        CorruptArtifactError: The run is damaged.
    """
    if not (training / "parts" / "recipe.json").exists():
        raise UserError(f"{printable(training, 300)} is no run of 'immiscible-noise train'; give its run folder")
    return Recipe.from_fields(artifact.load(training / "parts" / "recipe").fields)


def load_snapshot(recipe: Recipe, training: Path, step: int, device: torch.device | str = "cpu") -> NetworkDenoiser:
    """Returns the denoiser with the averaged weights that were kept after `step` steps.

    Raises:
        UserError: The training did not get that far.
    """
    path = training / "parts" / snapshot_key(step)
    if not path.with_suffix(".json").exists():
        raise UserError(f"{printable(training, 300)} has no weights of step {step}; run its training to the end")
    denoiser = recipe.denoiser()
    denoiser.backbone.load_state_dict(artifact.load(path).tensors)
    return denoiser.to(device).eval().requires_grad_(False)


def _missing_steps(run: Run, settings: TrainSettings) -> list[int]:
    """Returns the steps, ascending, whose weights are still missing."""
    return [step for step in settings.snapshot_steps if run.missing([snapshot_key(step)])]


def _restart_before(step: int, run: Run) -> None:
    """Deletes a checkpoint that lies after missing weights: resuming from it would never make them again."""
    checkpoint = run.folder / "checkpoints" / "last.ckpt"
    if run.leading and iterations_done(checkpoint) >= step:
        _LOG.warning("the weights of step %d are lost: training starts anew", step)
        checkpoint.unlink()


def _grid(recipe: Recipe, denoiser: NetworkDenoiser, device: torch.device) -> Tensor:
    rows, labels = torch.arange(40), recipe.some_labels(40)
    return recipe.generate(
        denoiser, rows, labels, steps=1 if recipe.settings.consistency else 20, seed=recipe.seed, stream=_GRID_STREAM
    )
