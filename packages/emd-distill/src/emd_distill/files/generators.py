"""Trained generators in files: a safetensors file with a sidecar, or the folder of an exported model."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffcore.denoiser import NetworkDenoiser
from diffcore.errors import UserError, printable
from diffcore.io import artifact
from diffcore.io.strictjson import read_untrusted
from diffcore.models import DiffusionModel, load
from diffcore.runtime import Runtime
from emd_distill.generator import OneStepGenerator

SCHEMA = "emd-distill/generator@1"
CARD = "emd-distill.json"
"""File of an exported folder that says how its network is called."""


@dataclass(frozen=True, eq=False)
class StoredGenerator:
    """A generator that was read.

    Attributes:
        generator: The generator, in evaluation mode, with weights that do not learn.
        training: How it was trained, as far as its file says.
        model: Whole model, where an exported folder was read.
    """

    generator: OneStepGenerator
    training: Mapping[str, Any] = field(default_factory=dict)
    model: DiffusionModel | None = None


def save_generator(path: Path, generator: OneStepGenerator, **training: Any) -> Path:
    """Writes a generator's weights with the noise level at which it is called; returns the path.

    Args:
        path: File that ends in .safetensors; its sidecar is written beside it.
        generator: Trained generator around a network.
        **training: Plain values that say how it was trained: num_steps, gamma_e, gamma_z, iterations, teacher.

    Example:
        >>> from tempfile import mkdtemp
        >>> from emd_distill.digits import load_teacher
        >>> path = save_generator(Path(mkdtemp()) / "g.safetensors", OneStepGenerator(load_teacher(), 2.5), num_steps=0)
        >>> load_generator(path, load_teacher()).training
        {'num_steps': 0}
    """
    assert isinstance(generator.denoiser, NetworkDenoiser)
    tensors = {name: value.detach() for name, value in generator.denoiser.backbone.state_dict().items()}
    return artifact.save(path, tensors, schema=SCHEMA, t=generator.t, training=training)


def load_generator(source: Path | str, teacher: NetworkDenoiser, *, runtime: Runtime | None = None) -> StoredGenerator:
    """Reads a generator.

    Args:
        source: Run folder of a training, file that `save_generator` wrote, or the folder of an exported model.
        teacher: Denoiser of the teacher, whose network has the generator's architecture.
        runtime: Options that say where the network of a folder is put; by default the CPU.

    Raises:
        UserError: There is no generator, or it is of another architecture than the teacher.
    """
    source = Path(source)
    trained = next((one for one in (source / "generator", source) if (one / "generator.json").is_file()), None)
    source = source if trained is None else trained / "generator.safetensors"
    if source.is_dir():
        return _from_folder(source, runtime or Runtime(device="cpu"))
    if not source.with_suffix(".safetensors").is_file():
        raise UserError(f"{printable(source, 300)} is no generator; give its safetensors file, or an exported folder")
    stored = artifact.load(source, schema=SCHEMA)
    denoiser = copy.deepcopy(teacher).requires_grad_(False).eval()
    own = denoiser.backbone.state_dict()
    if sorted(own) != sorted(stored.tensors) or any(own[n].shape != v.shape for n, v in stored.tensors.items()):
        raise UserError(
            f"the weights in {printable(source, 300)} do not fit the teacher's {type(denoiser.backbone).__name__}; "
            "give the teacher that it was distilled from"
        )
    denoiser.backbone.load_state_dict(stored.tensors)
    told = stored.fields.get("training")
    if told is None:  # a run of train tells its settings, the loss's own among them
        told = {"teacher": stored.fields.get("model_name"), **stored.fields.get("settings", {})}
        loss = told.pop("loss", None)
        told |= loss if isinstance(loss, dict) else {}
    return StoredGenerator(OneStepGenerator(denoiser, stored.fields["t"]), told)


def _from_folder(folder: Path, runtime: Runtime) -> StoredGenerator:
    if not (folder / CARD).is_file():
        raise UserError(
            f"{printable(folder, 300)} has no {CARD}, which says at which level its network is called; give a folder "
            "that export wrote"
        )
    stated = read_untrusted(folder / CARD)
    t = stated.get("t")
    if not isinstance(t, int | float) or not t >= 0:
        raise UserError(f"{printable(folder / CARD, 300)} says t = {printable(t)}, which is no level; export it again")
    model = load(folder, runtime)
    training = stated.get("training")
    return StoredGenerator(OneStepGenerator(model.denoiser, t), training if isinstance(training, dict) else {}, model)
