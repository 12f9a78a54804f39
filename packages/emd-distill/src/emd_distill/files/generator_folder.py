"""A trained generator as a folder: averaged weights in safetensors, and what is needed to draw with them.

`generator.safetensors` holds the weights of the backbone, `generator.json` the teacher's name and fingerprint, the
level t at which the network is called, and the settings of the training.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffcore.errors import IncompatibleModelError, UserError, printable
from diffcore.io import artifact
from diffcore.models import DiffusionModel, load
from diffcore.runtime import Runtime
from emd_distill.generator import OneStepGenerator

SCHEMA = "emd-distill/generator@1"
_NAME = "generator"


@dataclass(frozen=True, eq=False)
class LoadedGenerator:
    """A generator, and the model that it was distilled from.

    Attributes:
        model: The teacher, whose codec and prompt encoder belong to the generator too.
        generator: One-step generator: (z, condition) to x0; pass it to `diffcore.models.generate`.
        facts: Content of `generator.json`: model, t, schedule, settings, iterations.
    """

    model: DiffusionModel
    generator: OneStepGenerator
    facts: Mapping[str, Any]


def save_generator(folder: Path, generator: OneStepGenerator, model: DiffusionModel, source: str, **facts: Any) -> Path:
    """Writes a generator's weights, and what is needed to draw with it.

    Args:
        folder: Folder that is made where it does not exist.
        generator: Generator that was made from the model's denoiser.
        model: The teacher, as it was loaded.
        source: Name by which `diffcore.models.load` finds the teacher.
        facts: Plain values that are written too, such as settings and the number of iterations.
    """
    backbone: Any = generator.denoiser
    schedule = model.denoiser.schedule
    told = {
        "model": source,
        "model_name": model.name,
        "model_fingerprint": model.fingerprint,
        "t": generator.t,
        "prediction_type": model.denoiser.prediction_type,
        "schedule": {"kind": type(schedule).__name__, **_plain(vars(schedule))},
        "shape": list(model.shape),
    }
    return artifact.save(folder / _NAME, backbone.backbone.state_dict(), schema=SCHEMA, **told, **facts)


def load_generator(
    folder: Path | str, runtime: Runtime | None = None, *, model: str | DiffusionModel | None = None, **loading: Any
) -> LoadedGenerator:
    """Loads a generator that `emd-distill train` wrote.

    Args:
        folder: Run folder of a training, or the folder `generator` in it.
        runtime: Device and precision; by default those of `Runtime()`.
        model: Teacher in place of the one that the folder names, where that was moved.
        loading: Keyword arguments of `diffcore.models.load`.

    Raises:
        UserError: The folder holds no generator.
        CorruptArtifactError: The weights are damaged.
        IncompatibleModelError: The model is not the teacher.

    Example:
        >>> from tempfile import mkdtemp
        >>> cpu = Runtime(device="cpu")
        >>> teacher = load("zoo:digits8-edm", cpu)
        >>> folder = Path(mkdtemp())
        >>> _ = save_generator(folder, OneStepGenerator(teacher.denoiser, 2.5), teacher, "zoo:digits8-edm")
        >>> load_generator(folder, cpu).generator.t
        2.5
    """
    folder = Path(folder)
    place = next((one for one in (folder / _NAME, folder) if (one / f"{_NAME}.json").is_file()), None)
    if place is None:
        raise UserError(f"{printable(folder, 300)} holds no generator; give a run folder of a finished training")
    stored = artifact.load(place / _NAME, schema=SCHEMA)
    facts = stored.fields
    if not isinstance(model, DiffusionModel):
        model = load(model or facts["model"], runtime or Runtime(), **loading)
    if model.fingerprint != facts["model_fingerprint"]:
        raise IncompatibleModelError(
            f"{printable(model.name)} is not the model that this generator was distilled from, which was called "
            f"{printable(facts['model_name'])}; point to that one with `model`"
        )
    denoiser = copy.deepcopy(model.denoiser)
    denoiser.backbone.load_state_dict(stored.tensors)
    generator = OneStepGenerator(denoiser, facts["t"]).requires_grad_(False).eval()
    return LoadedGenerator(model, generator.to(model.device), facts)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if isinstance(value, bool | int | float | str)}
