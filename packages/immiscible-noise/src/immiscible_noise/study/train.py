"""Trains one model on images with one coupling of noise and images, into a run folder that can be resumed."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffcore.data import ImageSet
from diffcore.denoiser import Denoiser, NetworkDenoiser
from diffcore.errors import MachineError, UserError, printable
from diffcore.io import artifact
from diffcore.run import Run
from diffcore.runtime import Runtime
from diffcore.train import (
    EMA,
    ConsoleSummary,
    DenoisingModule,
    SampleGrid,
    Snapshots,
    StepData,
    fit,
    iterations_done,
    snapshot_key,
)
from immiscible_noise.consistency import IMPROVED, ORIGINAL, consistency_training_loss
from immiscible_noise.coupling import Coupling
from immiscible_noise.study.pairing import VisitedData, pair_noise_of
from immiscible_noise.study.recipe import GRID_STREAM, AnyRecipe, PixelScale, Recipe
from immiscible_noise.study.settings import FitSettings, TrainSettings
from immiscible_noise.study.tuned_recipe import recipe_of

_LOG = logging.getLogger("diffcore.immiscible_noise")


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

    def at_visits(self, batch: Mapping[str, Any], visits: Int[Tensor, " b"]) -> Mapping[str, Any]:
        """Returns the batch as it is: nothing in it depends on the visits."""
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
    batches = Batches(images, recipe.scale, settings.class_conditional)
    module = _MODULES.get(settings.objective, DenoisingModule)
    fit_recipe(recipe, run, runtime, batches, module)
    return recipe


def fit_recipe(
    recipe: AnyRecipe,
    run: Run,
    runtime: Runtime,
    batches: VisitedData,
    module: Callable[..., DenoisingModule],
) -> None:
    """Trains what a recipe describes and keeps its averaged weights, with the recipe, in a run.

    Weights that are there already are not made again, and an interrupted training continues from its last checkpoint.

    Args:
        recipe: Recipe of what is trained, and how.
        run: Run folder that receives checkpoints, snapshots and the recipe.
        runtime: Device, precision and processes.
        batches: Data set of the training.
        module: Makes the training step from a denoiser and the options of `DenoisingModule`.

    Raises:
        MachineError: The training stopped early, or its loss became NaN or infinite.
    """
    settings = recipe.settings
    missing = _missing_steps(run, settings)
    if not missing:
        return
    _restart_before(missing[0], run)
    run.save("recipe", {}, **recipe.fields())
    ema = EMA(settings.ema_decay)
    fit(
        module(
            recipe.denoiser(),
            optimizer=recipe.optimizer,
            pair_noise=pair_noise_of(recipe.coupling, recipe.seed, settings, batches),
            learning_rate_factor=(lambda step: min(1.0, (step + 1) / settings.warmup)) if settings.warmup else None,
            seed=recipe.seed,
        ),
        StepData(batches, settings.batch_size, recipe.seed),
        steps=settings.steps,
        folder=run.folder,
        runtime=runtime,
        callbacks=[
            ema,
            Snapshots(run, ema, settings.snapshot_steps, settings.batch_size, part=recipe.kept_part),
            SampleGrid(run, ema, partial(_grid, recipe), every=-(-settings.steps // 4)),
            ConsoleSummary(f"training {recipe.coupling.name}"),
        ],
        checkpoint_every=settings.checkpoint_every,
        gradient_clip=settings.gradient_clip or None,
    )
    if run.leading and _missing_steps(run, settings):  # a signal that whoever started us ignores can end the fit early
        raise MachineError("the training stopped before its last step; run the same command again to go on")


class ConsistencyModule(DenoisingModule):
    """Trains a consistency function as first published; noise is assigned once for both levels of a pair."""

    denoiser: NetworkDenoiser
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


def read_recipe(training: Path) -> AnyRecipe:
    """Reads the recipe of a training run from its folder, without opening the run.

    Raises:
        UserError: The folder is no training run.
        CorruptArtifactError: The run is damaged.
    """
    if not (training / "parts" / "recipe.json").exists():
        raise UserError(f"{printable(training, 300)} is no run of 'immiscible-noise train'; give its run folder")
    return recipe_of(artifact.load(training / "parts" / "recipe").fields)


def load_snapshot(recipe: AnyRecipe, training: Path, step: int, device: torch.device | str = "cpu") -> NetworkDenoiser:
    """Returns the denoiser with the averaged weights that were kept after `step` steps.

    Raises:
        UserError: The training did not get that far.
    """
    path = training / "parts" / snapshot_key(step)
    if not path.with_suffix(".json").exists():
        raise UserError(f"{printable(training, 300)} has no weights of step {step}; run its training to the end")
    return recipe.restored(artifact.load(path).tensors).to(device).eval().requires_grad_(False)


def _missing_steps(run: Run, settings: FitSettings) -> list[int]:
    """Returns the steps, ascending, whose weights are still missing."""
    return [step for step in settings.snapshot_steps if run.missing([snapshot_key(step)])]


def _restart_before(step: int, run: Run) -> None:
    """Deletes a checkpoint that lies after missing weights: resuming from it would never make them again."""
    checkpoint = run.folder / "checkpoints" / "last.ckpt"
    if run.leading and iterations_done(checkpoint) >= step:
        _LOG.warning("the weights of step %d are lost: training starts anew", step)
        checkpoint.unlink()


def _grid(recipe: AnyRecipe, denoiser: Denoiser, device: torch.device) -> Tensor:
    count = 8 if recipe.has_codec else 40
    steps = 1 if recipe.settings.consistency else 20
    conditions = recipe.some_conditions(count)
    return recipe.generate(denoiser, torch.arange(count), conditions, steps=steps, seed=recipe.seed, stream=GRID_STREAM)
