"""Fine-tunes a trained model, whole or as a LoRA, on latents and conditions that were encoded once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from diffcore.data import ImageSet
from diffcore.denoiser import Denoiser
from diffcore.models import DiffusionModel
from diffcore.noise import philox_uniform
from diffcore.run import Run
from diffcore.runtime import Runtime
from diffcore.train import DenoisingModule
from immiscible_noise.coupling import Coupling
from immiscible_noise.study.settings import FineTuneSettings
from immiscible_noise.study.train import fit_recipe
from immiscible_noise.study.tuned_recipe import FineTuneRecipe, told_of
from immiscible_noise.study.tuning_set import TuningSet

_DROPOUT_STREAM = 108


class CaptionedBatches:
    """Batches of latents for the trainer, with conditions that depend on the visit: some come without their caption.

    Args:
        data: Latents and conditions of the images.
        recipe: How the model is fine-tuned.
    """

    def __init__(self, data: TuningSet, recipe: FineTuneRecipe) -> None:
        assert data.latents is not None  # encoded for training
        self.latents, self.places, self.table = data.latents, data.places, data.table
        self.told, self.dropout, self.seed = recipe.told, recipe.settings.caption_dropout, recipe.seed

    def __len__(self) -> int:
        return len(self.latents)

    def __getitems__(self, indices: Int[Tensor, " b"]) -> dict[str, Any]:
        """Returns the latents of one batch."""
        return {"x0": self.latents[indices], "indices": indices}

    def at_visits(self, batch: Mapping[str, Any], visits: Int[Tensor, " b"]) -> Mapping[str, Any]:
        """Returns the batch with its conditions, and with what the coupling is told of them.

        Whether a visit comes without its caption is a function of its number; the empty caption then is the label, or
        the vector, that counts for the noise too.
        """
        if self.places is None or self.table is None:
            return batch
        places = self.places[batch["indices"]]
        if self.dropout and self.table.empty is not None:
            dropped = philox_uniform(self.seed, visits, (), stream=_DROPOUT_STREAM) < self.dropout
            places = torch.where(dropped, self.table.empty, places)
        told: dict[str, Any] = {**batch, "condition": self.table[places]}
        if self.told in ("block", "ignore"):
            told["labels"] = places
        if self.told == "soft":
            told["conditions"] = self.table.vectors[places]
        return told


class FineTuneModule(DenoisingModule):
    """The training step on latents, whose conditions are looked up on the host before the batch moves to the device.

    Args:
        denoiser: Denoiser that learns, or its LoRA.
        batches: Data set of the training.
        options: Keyword arguments of `DenoisingModule`.
    """

    def __init__(self, denoiser: Denoiser, *, batches: CaptionedBatches, **options: Any) -> None:
        super().__init__(denoiser, **options)
        self.batches = batches

    def on_before_batch_transfer(self, batch: Mapping[str, Any], dataloader_idx: int) -> Mapping[str, Any]:
        """Adds what depends on the visits of this iteration."""
        count = len(batch["x0"])
        first = (self.iteration * self._world_size + self.global_rank) * count
        return self.batches.at_visits(batch, torch.arange(first, first + count))

    @property
    def _world_size(self) -> int:
        return 1 if self._trainer is None else self.trainer.world_size


@dataclass(frozen=True)
class FineTuner:
    """Fine-tunes one model on one set of images, as often as a study asks; takes the place of `study.train.train`.

    Attributes:
        data: Latents and conditions of the images.
        model: Name or place of the model, as it is written into the recipe.
    """

    data: TuningSet
    model: str

    def recipe(self, images: ImageSet, coupling: Coupling, settings: FineTuneSettings, seed: int) -> FineTuneRecipe:
        """Returns the recipe of one training.

        Args:
            images: Images that the latents stand for.
            coupling: How noise meets images.
            settings: Length of the training, LoRA, learning rate.
            seed: Number that fixes order, noise, and the initial weights of a LoRA.

        Raises:
            UserError: The coupling heeds conditions, and the model takes none.
        """
        _, channels, height, width = images.images.shape
        return FineTuneRecipe(
            coupling=coupling,
            settings=settings,
            model=self.model,
            fingerprint=self.data.model.fingerprint,
            shape=(channels, height, width),
            told=told_of(coupling, self.data),
            seed=seed,
            data=self.data,
        )

    def __call__(
        self, images: ImageSet, run: Run, coupling: Coupling, settings: FineTuneSettings, runtime: Runtime
    ) -> FineTuneRecipe:
        """Fine-tunes the model and keeps its averaged weights at `settings.snapshot_steps`; see `study.train.train`.

        Args:
            images: Images that the latents stand for.
            run: Run folder that receives checkpoints, snapshots and the recipe.
            coupling: How noise meets images.
            settings: Length of the training, LoRA, learning rate.
            runtime: Seed, device, precision and processes.

        Raises:
            MachineError: The training stopped early, or its loss became NaN or infinite.
        """
        recipe = self.recipe(images, coupling, settings, runtime.seed)
        batches = CaptionedBatches(self.data, recipe)
        fit_recipe(recipe, run, runtime, batches, partial(FineTuneModule, batches=batches))
        return recipe


def fine_tune(
    model: DiffusionModel,
    images: Float[Tensor, "n c h w"] | UInt8[Tensor, "n c h w"],
    captions: Sequence[str] | None = None,
    *,
    folder: Path | str,
    labels: Int[Tensor, " n"] | None = None,
    coupling: Coupling | None = None,
    settings: FineTuneSettings | None = None,
    runtime: Runtime | None = None,
) -> DiffusionModel:
    """Fine-tunes a model on images and returns it with its new weights; the call again continues, or reads, the run.

    Args:
        model: Model that is fine-tuned, such as `diffcore.from_pipeline(pipe)`; it stays as it is.
        images: Square images, in [0, 1] or as 8-bit numbers.
        captions: Caption of each image, for a model that takes prompts.
        folder: Run folder of the training; it receives the model in diffusers' layout, or the LoRA's file.
        labels: Class of each image, for a class-conditional model.
        coupling: How noise meets images; by default by assignment.
        settings: Length of the training, LoRA, learning rate.
        runtime: Seed, device, precision and processes.

    Raises:
        UserError: Images and model do not fit, or the folder holds a run of other settings or data.
        MachineError: The training stopped early, or its loss became NaN or infinite.

    Example:
        >>> from tempfile import mkdtemp
        >>> from diffcore.models import from_pipeline
        >>> from diffcore.testing import tiny
        >>> few = FineTuneSettings(steps=2, batch_size=2, lora_rank=2, snapshots=1)
        >>> pipe, images = tiny.pipeline("sd15"), torch.rand(4, 3, 16, 16)
        >>> cpu = Runtime(device="cpu")
        >>> tuned = fine_tune(
        ...     from_pipeline(pipe), images, ["a toy"] * 4, folder=mkdtemp() + "/toy", settings=few, runtime=cpu
        ... )
        >>> tuned.fingerprint == from_pipeline(pipe).fingerprint
        False
    """
    from immiscible_noise.study.export import export_tuned, tuned_model

    coupling, settings, runtime = coupling or Coupling(), settings or FineTuneSettings(), runtime or Runtime()
    pixels = images if images.dtype == torch.uint8 else (images * 255).round().clamp(0, 255).to(torch.uint8)
    classes = () if labels is None else tuple(str(number) for number in range(int(labels.max()) + 1))
    names = tuple(f"{number:06d}" for number in range(len(pixels)))
    data = ImageSet(pixels.cpu(), None if labels is None else labels.cpu(), classes, names)
    config = {"coupling": coupling, "settings": settings, "captions": list(captions or ()), "seed": runtime.seed}
    inputs = {"images": data.sha256, model.name: model.fingerprint}
    with Run.open(Path(folder), command="immiscible-noise train", config=config, inputs=inputs) as run:
        tuner = FineTuner(TuningSet.encode(model, data, captions, run), model.name)
        recipe = tuner(data, run, coupling, settings, runtime)
        if run.leading:
            export_tuned(recipe, run)
            run.finish({"coupling": coupling.name, "steps": settings.steps, "images": len(data)})
        return tuned_model(recipe, run.folder)
