"""Option groups of the commands, and the images that they name."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from diffcore.errors import UserError, printable
from diffcore.runtime import Runtime
from immiscible_noise.coupling import Coupling, Preset
from immiscible_noise.study.settings import EvaluationSettings, TrainSettings

if TYPE_CHECKING:
    from diffcore.data import ImageSet

_LOG = logging.getLogger("diffcore.immiscible_noise")

Presets = Annotated[tuple[Preset, ...], Parameter(consume_multiple=True, negative="")]
Numbers = Annotated[tuple[int, ...], Parameter(consume_multiple=True, negative="")]
Noise = Annotated[Coupling, Parameter(name="*", group="Noise", negative="")]
Training = Annotated[TrainSettings, Parameter(name="*", group="Training", negative="")]
Evaluation = Annotated[EvaluationSettings, Parameter(name="*", group="Evaluation", consume_multiple=True, negative="")]


@Parameter(name="*", group="Data", negative="")
@dataclass(frozen=True)
class Data:
    """Which images, and how they are read.

    Attributes:
        size: Side in pixels; images are cropped to the centre square and resized. Needed where sizes differ.
        split: Folder inside the data to read, such as train.
        grey: Read the images as grey ones.
        strict: Stop at the first unreadable image instead of leaving it out.
    """

    size: int | None = None
    split: str | None = None
    grey: bool = False
    strict: bool = False

    def read(self, data: Path, *, at_least: int = 1) -> "tuple[ImageSet, dict[str, str]]":
        """Returns the images, and their sha256 by name; says what was left out.

        Raises:
            UserError: The images are too few, not square, or cannot be read.
        """
        from diffcore.data import load_images

        channels = 1 if self.grey else 3
        images = load_images(data, size=self.size, split=self.split, channels=channels, strict=self.strict)
        for name, reason in images.skipped:
            _LOG.warning("left out %s: it %s", printable(name), printable(reason, 200))
        for note in images.notes:
            _LOG.info("%s", note)
        height, width = images.images.shape[-2:]
        if height != width:
            raise UserError(
                f"{printable(data)} has {width} x {height} images; make them square with --size {min(height, width)}"
            )
        if len(images) < at_least:
            raise UserError(
                f"{printable(data)} has {len(images)} readable image; this command needs at least {at_least}"
            )
        return images, {printable(data.name): images.sha256}


def check_training(images: "ImageSet", couplings: list[Coupling], training: TrainSettings, runtime: Runtime) -> None:
    """Raises an error where settings do not fit the images, the machine or one another, before a folder is made."""
    from immiscible_noise.study.network import check_unet

    if training.class_conditional and images.labels is None:
        raise UserError(
            "the images have no sub-folders, so there are no labels; leave out --class-conditional, "
            "or put the images of each class into a folder of its own"
        )
    size = images.images.shape[-1]
    if training.for_image_size(size).network == "unet":
        check_unet(size, training.width)
    processes = runtime.devices * runtime.num_nodes
    if training.batch_size % processes:
        raise UserError(f"--batch-size is {training.batch_size}, no multiple of the {processes} processes")
    if not training.class_conditional and any(coupling.condition != "auto" for coupling in couplings):
        raise UserError(
            "labels matter to the noise (--condition, coupling 'ignore') only in class-conditional training; "
            "add --class-conditional"
        )


def seen(images: "ImageSet") -> dict[str, Any]:
    """Returns what was read, for a plan."""
    shape = "x".join(map(str, images.images.shape[1:]))
    return {"images": len(images), "shape": shape, "classes": len(images.classes)}


def plan_of_trainings(
    images: "ImageSet", training: TrainSettings, couplings: list[Coupling], seeds: int = 1
) -> dict[str, Any]:
    """Returns what trainings would cost, for a plan."""
    from immiscible_noise.study.train import recipe_for

    recipe = recipe_for(images, Coupling(), training, 0)
    parameters, runs = sum(p.numel() for p in recipe.denoiser().parameters()), len(couplings) * seeds
    return seen(images) | {
        "network": recipe.settings.network,
        "parameters": parameters,
        "trainings": runs,
        "couplings": ", ".join(coupling.name for coupling in couplings),
        "steps_each": training.steps,
        "images_seen_each": training.steps * training.batch_size,
        # Weights, gradients, two Adam moments and the average, in float32.
        "megabytes_of_weights_in_memory": round(parameters * 4 * 5 / 1e6, 1),
        "megabytes_on_disk": round(runs * parameters * 4 * (len(training.snapshot_steps) + 4) / 1e6, 1),
    }
