"""What `train`, `compare` and `evaluate` do with a folder of images, for new models and for fine-tuned ones."""

import logging
import warnings
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffcore.cli import settings as flat
from diffcore.data import ImageSet
from diffcore.digests import digest_of_values
from diffcore.errors import UserError, printable
from diffcore.models import DiffusionModel, load
from diffcore.run import Run
from diffcore.runtime import Runtime
from immiscible_noise.app.options import Captions, Data, FineTuning, Training, seen
from immiscible_noise.coupling import Coupling
from immiscible_noise.study.captions import Captioned
from immiscible_noise.study.compare import Trainer
from immiscible_noise.study.diagnosis import diagnose_images, diagnose_samples
from immiscible_noise.study.export import export_model, export_tuned
from immiscible_noise.study.finetune import FineTuner
from immiscible_noise.study.network import check_unet
from immiscible_noise.study.recipe import AnyRecipe, Recipe
from immiscible_noise.study.settings import FineTuneSettings, FitSettings, TrainSettings
from immiscible_noise.study.train import read_recipe, recipe_for, train
from immiscible_noise.study.tuned_recipe import FineTuneRecipe
from immiscible_noise.study.tuning_set import TuningSet, needs

_LOG = logging.getLogger("diffcore.immiscible_noise")
_MOST_ALONE = 0.25  # of the images, which have no other of their class in a batch


@dataclass(frozen=True)
class Work:
    """Images with the settings of trainings on them, all checked.

    Attributes:
        images: Images of the trainings.
        inputs: Digest of each input by name.
        couplings: Couplings that are trained with.
        settings: Settings that all trainings share.
        config: The same as a command line gives them.
    """

    images: ImageSet
    inputs: Mapping[str, str]
    couplings: Sequence[Coupling]
    settings: FitSettings
    config: Mapping[str, Any]

    def trainer(self, run: Run) -> Trainer:
        """Returns the function that trains with one coupling.

        Args:
            run: Run folder that keeps what all trainings need.
        """
        return train

    def train(self, run: Run, noise: Coupling, runtime: Runtime) -> dict[str, Any]:
        """Trains with one coupling, writes the result in diffusers' layout, and returns the figures of `result.json`.

        Args:
            run: Run folder of the training.
            noise: How noise meets images.
            runtime: Seed, device, precision and processes.
        """
        recipe = self.trainer(run)(self.images, run, noise, self.settings, runtime)
        if run.leading:
            if isinstance(recipe, FineTuneRecipe):
                export_tuned(recipe, run)
            elif isinstance(recipe, Recipe) and recipe.settings.network == "unet":
                export_model(recipe, run)
        return {"coupling": noise.name, "steps": self.settings.steps, "images": len(self.images)}

    def diagnose(self, run: Run, seed: int) -> None:
        """Measures what assigning noise does to the images, for the report.

        Args:
            run: Run folder that receives the parts.
            seed: Number that fixes batches and noise.
        """
        assert isinstance(self.settings, TrainSettings)
        diagnose_images(self.images, run, (self.settings.batch_size,), 4, self.settings.normalisation, seed)

    def plan(self, seeds: int = 1) -> dict[str, Any]:
        """Returns what the trainings would cost, for a plan.

        Args:
            seeds: Number of trainings with each coupling.
        """
        assert isinstance(self.settings, TrainSettings)
        recipe = recipe_for(self.images, Coupling(), self.settings, 0)
        parameters = sum(p.numel() for p in recipe.denoiser().parameters())
        return {**seen(self.images), "network": recipe.settings.network} | self._cost(parameters, parameters, seeds)

    def _cost(self, parameters: int, learning: int, seeds: int) -> dict[str, Any]:
        runs, settings = len(self.couplings) * seeds, self.settings
        return {
            "parameters": parameters,
            "trainings": runs,
            "couplings": ", ".join(coupling.name for coupling in self.couplings),
            "steps_each": settings.steps,
            "images_seen_each": settings.steps * settings.batch_size,
            # Weights, and of those that learn gradients, two moments of Adam and the average, in float32.
            "megabytes_of_weights_in_memory": round((parameters + learning * 4) * 4 / 1e6, 1),
            "megabytes_on_disk": round(runs * learning * 4 * (len(settings.snapshot_steps) + 4) / 1e6, 1),
        }


@dataclass(frozen=True)
class TuningWork(Work):
    """Images with captions, and a model that is fine-tuned on them.

    Attributes:
        model: Model that is fine-tuned.
        place: Name of the model on the command line.
        captioned: Captions of the images.
    """

    model: DiffusionModel
    place: str
    captioned: Captioned

    def trainer(self, run: Run) -> Trainer:
        """Returns the function that fine-tunes with one coupling; latents and conditions are encoded, or read, first.

        Args:
            run: Run folder that keeps latents and conditions.
        """
        return FineTuner(self._encoded(run), self.place)

    def _encoded(self, run: Run) -> TuningSet:
        return TuningSet.encode(self.model, self.images, self.captioned.captions or None, run)

    def diagnose(self, run: Run, seed: int) -> None:
        """Measures what assigning noise does to the latents, for the report.

        Args:
            run: Run folder that holds the latents, and receives the parts.
            seed: Number that fixes batches and noise.
        """
        data, sizes = self._encoded(run), (max(self.settings.batch_size, 2),)
        assert data.latents is not None  # encoded for training
        labels = data.places if data.shares_conditions else None
        device, decode = self.model.device, self.model.codec.decode
        diagnose_samples(
            data.latents,
            labels,
            run,
            sizes,
            4,
            seed,
            pictures=lambda x: decode(x.to(device)),
            shown_as="decoded latent",
        )

    def plan(self, seeds: int = 1) -> dict[str, Any]:
        """Returns what the trainings would cost, for a plan.

        Args:
            seeds: Number of trainings with each coupling.
        """
        assert isinstance(self.settings, FineTuneSettings)
        learning = whole = sum(p.numel() for p in self.model.backbone.parameters())
        if self.settings.lora_rank:
            from diffcore.train.lora import LoraDenoiser

            lora = LoraDenoiser(self.model.denoiser, self.settings.lora_rank, targets=self.settings.lora_targets)
            learning = sum(p.numel() for p in lora.parameters() if p.requires_grad)
        told = {
            "model": self.model.name,
            "latents": "x".join(map(str, self.model.shape_at(self.images.images.shape[-1]))),
            "captions": self.captioned.source,
            "distinct_captions": len(set(self.captioned.captions)),
            "parameters_that_learn": learning,
        }
        return seen(self.images) | told | self._cost(whole, learning, seeds)


def prepare(
    data: Path,
    images: Data,
    training: Training,
    tuning: FineTuning,
    captions: Captions,
    runtime: Runtime,
    couplings: Sequence[Coupling],
    *,
    at_least: int = 1,
) -> Work:
    """Reads what trainings need, and refuses what does not fit before a folder is made.

    Args:
        data: Folder or zip of images.
        images: How they are read.
        training: Settings of the trainings, as they were given.
        tuning: Model that is fine-tuned, if any.
        captions: Where the captions are.
        runtime: Device, precision and processes.
        couplings: Couplings that are trained with.
        at_least: Number of images that the command needs.

    Raises:
        UserError: Settings do not fit the images, the model, the machine or one another.
    """
    _ = runtime.torch_dtype  # refuses what this machine cannot do before anything is read
    if tuning.model is None:
        if captions.given:
            raise UserError(f"`{captions.given}` is for fine-tuning; name the model that is fine-tuned with `model`")
        loaded, inputs = images.read(data, at_least=at_least)
        new = training.new()
        _check_new(loaded, couplings, new, runtime)
        if new.class_conditional and loaded.labels is not None:
            _warn_of_few_alike(loaded.labels.tolist(), "class", couplings, new, runtime)
        return Work(loaded, inputs, couplings, new, flat(training=new) | _processes(couplings, runtime))
    settings = tuning.settings(training)
    model = load(tuning.model, runtime)
    loaded, _ = images.read(data, at_least=at_least, model=model)
    captioned = captions.read(data, loaded, model, images.split)
    _check_tuning(model, couplings, settings, runtime)
    if captioned.captions and not captioned.shared:
        for coupling in couplings:
            if coupling.scope == "global" and coupling.condition == "auto":
                raise UserError(
                    "hardly any two images have the same caption, and --scope global compares none; add --condition "
                    f"ignore, or take --window {settings.batch_size} in place of --scope, which compares them"
                )
    if captioned.shared:
        _warn_of_few_alike(captioned.captions, "caption", couplings, settings, runtime)
    elif needs(model) == "classes" and loaded.labels is not None:
        _warn_of_few_alike(loaded.labels.tolist(), "class", couplings, settings, runtime)
    return TuningWork(
        captioned.images,
        inputs_of(data, captioned, model),
        couplings,
        settings,
        flat(training=settings, model=tuning.model, captions=captions.captions, prompt=captions.prompt)
        | _processes(couplings, runtime),
        model,
        tuning.model,
        captioned,
    )


def bound_recipe(
    training: Path,
    data: Path,
    images: Data,
    captions: Captions,
    runtime: Runtime,
    base: str | None,
) -> "Bound":
    """Reads a training, and the images that its model is measured with.

    Args:
        training: Run folder of the training.
        data: Folder or zip of images.
        images: How they are read; by default at the size and in the channels of the training.
        captions: Where the captions are, for a model that was fine-tuned with captions.
        runtime: Device and precision of the model.
        base: Model that was fine-tuned, where it is no longer at the place that the training names.

    Raises:
        UserError: The folder is no training, or images, captions and model do not fit.
    """
    _ = runtime.torch_dtype  # refuses what this machine cannot do before anything is read
    recipe = read_recipe(training)
    channels, side = recipe.shape[:2]
    images = replace(images, size=images.size or side, grey=images.grey or channels == 1)
    if not isinstance(recipe, FineTuneRecipe):
        if captions.given or base:
            raise UserError(f"`{captions.given or 'base'}` is for fine-tuned models, and this one was trained anew")
        loaded, inputs = images.read(data, at_least=2)
        return Bound(recipe, loaded, inputs)
    model = load(base or recipe.model, runtime)
    loaded, _ = images.read(data, at_least=2, model=model)
    captioned = captions.read(data, loaded, model, images.split)
    return Bound(recipe, captioned.images, inputs_of(data, captioned, model), model, captioned)


@dataclass(frozen=True)
class Bound:
    """A recipe, images to measure its model with and, for a fine-tuned model, the model that it was and captions.

    Attributes:
        recipe: Recipe as the training keeps it.
        images: Real images to compare with.
        inputs: Digest of each input by name.
        model: Model that was fine-tuned.
        captioned: Captions of the images.
    """

    recipe: AnyRecipe
    images: ImageSet
    inputs: Mapping[str, str]
    model: DiffusionModel | None = None
    captioned: Captioned | None = None

    def with_data(self, run: Run) -> AnyRecipe:
        """Returns the recipe, that of a fine-tuned model with the conditions of the images.

        Args:
            run: Run folder that keeps the conditions.
        """
        if not isinstance(self.recipe, FineTuneRecipe) or self.model is None or self.captioned is None:
            return self.recipe
        captions = self.captioned.captions or None
        return self.recipe.with_data(TuningSet.encode(self.model, self.images, captions, run, with_latents=False))


def inputs_of(data: Path, captioned: Captioned, model: DiffusionModel) -> dict[str, str]:
    """Returns the digests of images, captions and model.

    Args:
        data: Folder or zip of the images.
        captioned: Images with their captions.
        model: Model that is fine-tuned.
    """
    digests = {printable(data.name): captioned.images.sha256, printable(model.name): model.fingerprint}
    if captioned.captions:
        digests["captions"] = digest_of_values(list(captioned.captions))
    return digests


def _check_new(images: ImageSet, couplings: Sequence[Coupling], training: TrainSettings, runtime: Runtime) -> None:
    if training.class_conditional and images.labels is None:
        raise UserError(
            "the images have no sub-folders, so there are no labels; leave out --class-conditional, "
            "or put the images of each class into a folder of its own"
        )
    size = images.images.shape[-1]
    if training.for_image_size(size).network == "unet":
        check_unet(size, training.width)
    _check_batches(training, couplings, runtime)
    if any(coupling.condition == "soft" for coupling in couplings):
        raise UserError("--condition soft is for captions; a new model is told labels at most: take block")
    if not training.class_conditional and any(coupling.condition != "auto" for coupling in couplings):
        raise UserError(
            "labels matter to the noise (--condition, coupling 'ignore') only in class-conditional training; "
            "add --class-conditional"
        )


def _check_tuning(
    model: DiffusionModel, couplings: Sequence[Coupling], tuning: FineTuneSettings, runtime: Runtime
) -> None:
    _check_batches(tuning, couplings, runtime)
    layers = [f".{name}" for name, _ in model.backbone.named_modules()]
    for end in tuning.lora_targets if tuning.lora_rank else ():
        if not any(name.endswith(f".{end}") for name in layers):
            raise UserError(f"--lora-targets names {printable(end)}, in which no layer of {printable(model.name)} ends")
    if tuning.gradient_checkpointing and not getattr(model.backbone, "_supports_gradient_checkpointing", False):
        raise UserError(
            f"{printable(model.name)} has no blocks that could be computed again; leave out --gradient-checkpointing"
        )
    if needs(model) is None:
        if tuning.caption_dropout:
            raise UserError(f"{printable(model.name)} takes no captions; leave out --caption-dropout")
        if any(coupling.condition != "auto" for coupling in couplings):
            raise UserError(f"{printable(model.name)} is told nothing of its images; leave out --condition")


def _warn_of_few_alike(
    told: Sequence[Hashable], kind: str, couplings: Sequence[Coupling], settings: FitSettings, runtime: Runtime
) -> None:
    """Warns where most images meet no other of their class in a batch, so that they keep the noise that was drawn."""
    shares = [count / len(told) for count in Counter(told).values()]
    for coupling in couplings:
        if coupling.method != "assignment" or coupling.window or coupling.condition not in ("auto", "block"):
            continue
        processes = 1 if coupling.scope == "global" else runtime.devices * runtime.num_nodes
        others = settings.batch_size // processes - 1
        alone = sum(share * (1 - share) ** others for share in shares)
        if alone > _MOST_ALONE:
            _LOG.warning(
                "in batches of %d, %.0f %% of the images meet no other of their %s, and keep the noise that was drawn; "
                "take --window 1024, larger batches, or --condition ignore",
                others + 1,
                100 * alone,
                kind,
            )
            # Of single batches the library says the same, of each again.
            warnings.filterwarnings("ignore", "all .* labels of this batch differ", UserWarning)
            return


def _processes(couplings: Sequence[Coupling], runtime: Runtime) -> dict[str, int]:
    """Returns the number of processes where it changes the result: each assigns noise inside its own share."""
    number = runtime.devices * runtime.num_nodes
    local = any(one.method == "assignment" and not one.window and one.scope == "local" for one in couplings)
    return {"processes": number} if local and number > 1 else {}


def _check_batches(settings: FitSettings, couplings: Sequence[Coupling], runtime: Runtime) -> None:
    for coupling in couplings:
        if 0 < coupling.window < settings.batch_size:
            raise UserError(
                f"--window is {coupling.window}, less than --batch-size {settings.batch_size}: fewer images would "
                "exchange noise than without it; give a larger one, or leave it out"
            )
    processes = runtime.devices * runtime.num_nodes
    if settings.batch_size % processes:
        raise UserError(f"--batch-size is {settings.batch_size}, no multiple of the {processes} processes")
