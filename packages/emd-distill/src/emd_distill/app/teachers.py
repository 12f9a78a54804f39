"""Teachers by the names of the command line: any diffusion model, or the digits that ship with the package."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffcore.cli import Loading, load_model
from diffcore.denoiser import Condition, NetworkDenoiser
from diffcore.errors import UserError
from diffcore.runtime import Runtime
from emd_distill.digits import GENERATOR_SIGMA, SHAPE, load_teacher
from emd_distill.draws import Conditions
from emd_distill.files.generators import load_generator
from emd_distill.generator import OneStepGenerator

if TYPE_CHECKING:
    from diffcore.models import DiffusionModel

DIGITS = "digits"
"""Name of the teacher that ships with this package."""


@dataclass(frozen=True, eq=False)
class Teacher:
    """A teacher as commands need it.

    Attributes:
        name: Name in results and on pages.
        fingerprint: Digest of its weights.
        denoiser: The teacher's network and schedule.
        shape: Shape of one sample.
        conditions: Conditions of an iteration; None for a model without any.
        to_pictures: Turns samples into images in [0, 1].
        model: The whole model; None for the digits of this package.
    """

    name: str
    fingerprint: str
    denoiser: NetworkDenoiser
    shape: tuple[int, ...]
    conditions: Conditions | None
    to_pictures: Callable[[Tensor], Tensor]
    model: "DiffusionModel | None" = None

    def given(self, count: int) -> Condition | None:
        """Returns the conditions of as many rows as are asked for, always the same.

        Args:
            count: Number of rows wanted.
        """
        return None if self.conditions is None else self.conditions(0, torch.arange(count))

    def generator(self, source: Path | None, level: float | None) -> OneStepGenerator:
        """Returns the generator to look at: a trained one, or the teacher itself, called once.

        Args:
            source: Trained generator; None takes the teacher.
            level: Ratio sigma / alpha of the call, for the teacher alone; by default 2.5.
        """
        if source is not None:
            return load_generator(source, self.model or self.denoiser).generator
        return OneStepGenerator(
            copy.deepcopy(self.denoiser), time_of(self.denoiser, GENERATOR_SIGMA if level is None else level)
        )


def time_of(denoiser: NetworkDenoiser, ratio: float) -> float:
    """Returns the noise level with a ratio sigma / alpha, in the units of a denoiser's schedule.

    Args:
        denoiser: Denoiser whose schedule is meant.
        ratio: Noise over signal; must be positive.

    Raises:
        UserError: The ratio is not positive.
    """
    if not ratio > 0:
        raise UserError(f"`level` is {ratio}; give a positive sigma / alpha")
    return float(denoiser.schedule.timestep_at(-2 * torch.tensor([ratio], dtype=torch.float64).log())[0])


def read_teacher(name: str, loading: Loading, runtime: Runtime, prompts: tuple[str, ...] = ()) -> Teacher:
    """Returns the teacher that a command names.

    Args:
        name: Name on the command line; "digits" is the one of this package.
        loading: Options that say how a model is read.
        runtime: Options that say where it runs.
        prompts: Prompts that rows take in turn, for models that take prompts.

    Raises:
        UserError: There is no such model, or prompts were given to a model that takes none.
    """
    if name == DIGITS:
        from emd_distill.digits import digit_classes

        if prompts:
            raise UserError("`prompts` were given, and the digits take none; leave them out")
        runtime.apply_threads()
        network = load_teacher()
        return Teacher(DIGITS, "emd-distill/digits", network, SHAPE, digit_classes, lambda x: (x / 2 + 0.5).clamp(0, 1))
    model = load_model(name, loading, runtime)
    decode: Callable[[Tensor], Tensor] = model.codec.decode
    return Teacher(
        model.name, model.fingerprint, model.denoiser, model.shape, conditions_of(model, prompts), decode, model
    )


def conditions_of(model: "DiffusionModel", prompts: tuple[str, ...]) -> Conditions | None:
    """Returns the conditions of a model's iterations: prompts in turn, or classes in turn, or none.

    Args:
        model: Diffusion model of the teacher.
        prompts: Prompts that rows take in turn; without any, the empty prompt.

    Raises:
        UserError: Prompts were given to a model that takes none.
    """
    if prompts and model.prompts is None:
        raise UserError(f"`prompts` were given, and {model.name} takes none; leave them out")
    empty = dict(model.empty_condition(1))
    if "class_labels" in empty:
        count = _classes(model.backbone)
        return lambda step, rows: {"class_labels": (rows + step) % count}
    if not empty:
        return None
    table = dict(model.prompts(list(prompts))) if prompts and model.prompts is not None else empty
    number = len(next(iter(table.values())))
    return lambda step, rows: {key: value[(rows + step) % number] for key, value in table.items()}


def _classes(backbone: Any) -> int:
    config = backbone.config
    return int(config.get("num_class_embeds") or config.get("num_embeds_ada_norm") or 1)


def clean_samples(teacher: Teacher, folder: Path | None, count: int = 64) -> Tensor:
    """Returns clean data in the space of a teacher's samples.

    Args:
        teacher: Teacher whose codec encodes images.
        folder: Folder of images; None takes the digits, in the order of the classes that rows take.
        count: Largest number of images.

    Raises:
        UserError: The folder has no image, or a folder was given for the digits.
    """
    if teacher.model is None:
        from diffcore.zoo.digits.data import load_digits

        if folder is not None:
            raise UserError("`data` was given, and the digits bring their own; leave it out")
        images, labels = load_digits()
        per_class = [(labels == digit).nonzero().flatten() for digit in range(10)]
        order = torch.stack([per_class[row % 10][row // 10] for row in range(count)])
        return 2 * images[order] - 1
    from diffcore.data import load_images

    assert folder is not None
    side = teacher.shape[-1] * int(getattr(teacher.model.codec, "factor", 1))
    channels = 1 if teacher.model.codec.__class__.__name__ == "PixelCodec" and teacher.shape[0] == 1 else 3
    images = load_images(folder, size=side, channels=channels).images[:count].float() / 255
    with torch.no_grad():
        return teacher.model.codec.encode(images.to(teacher.model.device)).float()
