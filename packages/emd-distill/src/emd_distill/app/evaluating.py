"""Measuring a generator against its teacher's samples or a folder of images: what evaluate does."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffcore.data import ImageSet, load_images
from diffcore.denoiser import Condition
from diffcore.errors import UserError, printable
from diffcore.models import DiffusionModel
from diffcore.models.generation import null_condition
from diffcore.run import Run
from diffcore.runtime import Runtime
from emd_distill.generator import OneStepGenerator
from emd_distill.quality import LEAST, Features, drawn_images, features_for, image_shape, measured, teacher_images

_SHOWN = 20


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a generator is measured on.

    Attributes:
        model: The teacher, whose codec belongs to the generator too.
        generator: Generator that is measured.
        condition: Conditions of twice `count` images; empty for a model without any.
        count: Number of images of each side.
        runtime: Seed of the latents, and device.
        images: Images to measure against; None for the teacher's samples.
        guidance_scale: Strength of the teacher's guidance; 0 and 1 are off.
        teacher_steps: Number of solver steps of the teacher; None for the usual number.
        features: Name of the features; None for those that suit the size.
        batch_size: Number of images in one call of a network.
        allow_pickle: Whether features of TorchScript, which is code, may be run.
    """

    model: DiffusionModel
    generator: OneStepGenerator
    condition: Condition
    count: int
    runtime: Runtime
    images: ImageSet | None
    guidance_scale: float
    teacher_steps: int | None
    features: str | None
    batch_size: int
    allow_pickle: bool = False

    @property
    def plan(self) -> dict[str, Any]:
        """What the evaluation would do."""
        against = "the teacher's samples" if self.images is None else f"{len(self.images):,} images"
        return {"images_of_each": self.count, "against": against, "guidance_scale": self.guidance_scale}

    def check(self) -> None:
        """Refuses guidance that the teacher does not have, and features that there are not.

        Raises:
            UserError: The teacher has no condition that guidance could lead away from, steps are below 1, or there is
                no such extractor.
        """
        if self.teacher_steps is not None and self.teacher_steps < 1:
            raise UserError(f"`teacher_steps` is {self.teacher_steps}; give at least 1")
        self._uncond()
        self._features()

    def __call__(self, run: Run) -> dict[str, Any]:
        """Draws, measures, and keeps tables and grids; returns the scores of the generator.

        Args:
            run: Run folder that keeps them.
        """
        model, seed = self.model, self.runtime.seed
        plain = OneStepGenerator(model.denoiser, self.generator.t)
        drawn = {
            "generator, 1 step": self._kept(run, "generator", lambda: self._drawn(self.generator, seed)),
            "teacher, 1 step": self._kept(run, "one-step", lambda: self._drawn(plain, seed)),
            "teacher, many steps": self._kept(run, "teacher", lambda: self._teacher(seed, 0)),
        }
        if self.images is None:
            reference = self._kept(run, "reference", lambda: self._teacher(seed + 1, self.count))
        else:
            reference = self.images.images.float() / 255
        name, features = self._features()
        told = features(reference)
        scores = {who: measured(told, features(images)).to_json() for who, images in drawn.items()}
        rows = [{"images of": who, **{key: round(v, 3) for key, v in one.items()}} for who, one in scores.items()]
        run.keep_table(
            "scores",
            rows,
            f"{self.count:,} images of each against {len(reference):,} "
            f"{'samples of the teacher' if self.images is None else 'images'}, in features of {name}, with five "
            "neighbours.",
        )
        shown = torch.stack([images[:_SHOWN] for images in drawn.values()])
        run.save(
            "grids",
            {"pictures": shown},
            labels=list(drawn),
            caption="The same latents and conditions in each row, so that columns can be compared.",
        )
        mine, best = scores["generator, 1 step"], scores["teacher, many steps"]
        return {
            "answer": f"In one step the generator is at a Fréchet distance of {mine['distance']:.3g} with a recall of "
            f"{mine['recall']:.2f}; its teacher in many steps is at {best['distance']:.3g} and {best['recall']:.2f}.",
            "features": name,
            "scores": scores,
        }

    def _features(self) -> tuple[str, Features]:
        return features_for(image_shape(self.model), self.features, self.runtime, allow_pickle=self.allow_pickle)

    def _kept(self, run: Run, key: str, make: Any) -> Tensor:
        if not run.has(key):
            run.save(key, {"images": make()})
        return run.load(key).tensors["images"]

    def _rows(self, start: int) -> Condition:
        return {name: value[start : start + self.count] for name, value in self.condition.items()}

    def _drawn(self, generator: torch.nn.Module, seed: int) -> Tensor:
        return drawn_images(self.model, generator, self._rows(0), self.count, seed=seed, batch_size=self.batch_size)

    def _teacher(self, seed: int, start: int) -> Tensor:
        return teacher_images(
            self.model, self._rows(start), self.count, seed=seed, steps=self.teacher_steps,
            guidance_scale=self.guidance_scale, uncond=self._uncond(), batch_size=self.batch_size,
        )  # fmt: skip

    def _uncond(self) -> Condition | None:
        if self.guidance_scale in (0, 1):
            return None
        try:
            return null_condition(self.model)
        except ValueError as error:
            raise UserError(
                f"{printable(self.model.name)} has no condition that guidance could lead away from; leave out "
                "`guidance_scale`"
            ) from error


@dataclass(frozen=True, eq=False)
class Picture:
    """An image that `Run.figure` writes pixel by pixel.

    Attributes:
        image: Channels, height and width, in [0, 1].
    """

    image: Float[Tensor, "c h w"]

    def savefig(self, fname: Any, **options: Any) -> None:
        """Writes the image as a PNG.

        Args:
            fname: File or buffer that is written to.
            options: Settings of matplotlib's, which say nothing here.
        """
        from PIL import Image

        pixels = (self.image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
        Image.fromarray(pixels.squeeze(-1).numpy()).save(fname, format="PNG")


def reference_of(images: Path | None, model: DiffusionModel) -> tuple[ImageSet | None, dict[str, str]]:
    """Returns the images to measure against, in the model's size, and their digest.

    Args:
        images: Folder or zip archive; None for none.
        model: Model whose images they are compared with.

    Raises:
        UserError: There are too few readable images.
    """
    if images is None:
        return None, {}
    channels, _, side = image_shape(model)
    read = load_images(images, size=side, channels=channels)
    if len(read) < LEAST:
        raise UserError(f"{printable(images, 300)} has {len(read)} readable images; give at least {LEAST}")
    return read, {printable(images.name): read.sha256}
