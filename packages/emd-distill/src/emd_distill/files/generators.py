"""Trained generators in files: weights in safetensors with a sidecar, or the folder of an exported model.

`generator.safetensors` holds the weights of the network, or its LoRA; `generator.json` the level t at which it is
called, the teacher's name and fingerprint where it is a model, and how it was trained.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffcore.denoiser import Denoiser, NetworkDenoiser
from diffcore.errors import CorruptArtifactError, IncompatibleModelError, UserError, printable
from diffcore.io import artifact
from diffcore.io.strictjson import read_untrusted
from diffcore.models import DiffusionModel, load
from diffcore.noise import row_noise
from diffcore.runtime import Runtime
from emd_distill.generator import OneStepGenerator
from emd_distill.lora import LoraDenoiser
from emd_distill.warm_start import channels_of, with_channels

SCHEMA = "emd-distill/generator@1"
CARD = "emd-distill.json"
"""File of an exported folder that says how its network is called."""
NAME = "generator"
"""Folder of a run that holds the generator, and the stem of its files."""


TOLERANCE: Mapping[str, float] = {"float32": 1e-5, "float16": 2e-2, "bfloat16": 1e-1}
"""Largest difference to g(z) of a folder in each precision, relative to the largest value of g(z) or 1."""
_OTHER_MACHINE = 10  # times as much may a folder differ in float32 that is read on another machine
_TESTED = 64  # numbers of g(z) that a folder keeps of itself


@dataclass(frozen=True, eq=False)
class StoredGenerator:
    """A generator that was read.

    Attributes:
        generator: The generator, in evaluation mode, with weights that do not learn.
        facts: Content of its file: t, model, iterations, training, settings.
        model: The teacher, whose codec and prompt encoder belong to the generator too, or the whole exported model;
            None where the teacher was given as a bare network.
    """

    generator: OneStepGenerator
    facts: Mapping[str, Any] = field(default_factory=dict)
    model: DiffusionModel | None = None

    @property
    def training(self) -> dict[str, Any]:
        """How it was trained in plain values, the loss's own among them."""
        told = {key: self.facts[key] for key in ("model_name", "iterations") if key in self.facts}
        told |= self.facts.get("training") or {}
        loss = told.pop("loss", None)
        return told | (loss if isinstance(loss, dict) else {})


def save_generator(
    path: Path,
    generator: OneStepGenerator,
    *,
    model: DiffusionModel | None = None,
    source: str = "",
    training: Mapping[str, Any] | None = None,
    **facts: Any,
) -> Path:
    """Writes a generator's weights, and what is needed to draw with it; returns the path.

    Args:
        path: File that ends in .safetensors; its sidecar is written beside it.
        generator: Trained generator around a network.
        model: The teacher, where it is a model.
        source: Name by which `diffcore.models.load` finds that model.
        training: Plain values that say how it was trained, such as the fields of `Settings`.
        **facts: Further plain values, such as the number of iterations.

    Example:
        >>> from tempfile import mkdtemp
        >>> from emd_distill.digits import load_teacher
        >>> teacher = load_teacher()
        >>> told = {"num_steps": 0}
        >>> path = save_generator(Path(mkdtemp()) / "g.safetensors", OneStepGenerator(teacher, 2.5), training=told)
        >>> load_generator(path, teacher).training
        {'num_steps': 0}
    """
    told: dict[str, Any] = {"t": generator.t, "training": dict(training or {})}
    denoiser = generator.denoiser
    if isinstance(denoiser, LoraDenoiser):
        told["lora"] = {"rank": denoiser.rank, "alpha": denoiser.alpha, "targets": denoiser.targets}
    if model is not None and (channels := channels_of(denoiser)) != channels_of(model.denoiser):
        told["channels"] = channels
    if model is not None:
        told |= {
            "model": source,
            "model_name": model.name,
            "model_fingerprint": model.fingerprint,
            "prediction_type": model.denoiser.prediction_type,
            "schedule": _schedule(model),
            "shape": list(model.shape),
        }
    return artifact.save(path, _tensors(denoiser), schema=SCHEMA, **told, **facts)


def load_generator(
    source: Path | str,
    teacher: DiffusionModel | NetworkDenoiser | str | None = None,
    *,
    runtime: Runtime | None = None,
    **loading: Any,
) -> StoredGenerator:
    """Reads a generator that `emd-distill train` or `export` wrote.

    Args:
        source: Run folder of a training, folder `generator` in it, file that `save_generator` wrote, or an exported
            folder.
        teacher: The teacher, its bare network, or its name where it was moved; by default the one that the file names.
        runtime: Device and precision of what is loaded by name; by default the CPU.
        loading: Keyword arguments of `diffcore.models.load`.

    Raises:
        UserError: There is no generator, it names no teacher, or it is of another architecture than the teacher.
        CorruptArtifactError: The weights are damaged, or an exported folder draws other samples than when it was
            written.
        IncompatibleModelError: The model is not the one that it was distilled from.

    Example:
        >>> from tempfile import mkdtemp
        >>> cpu = Runtime(device="cpu")
        >>> teacher = load("zoo:digits8-edm", cpu)
        >>> path = Path(mkdtemp()) / "generator.safetensors"
        >>> _ = save_generator(path, OneStepGenerator(teacher.denoiser, 2.5), model=teacher, source="zoo:digits8-edm")
        >>> load_generator(path.parent, runtime=cpu).generator.t
        2.5
    """
    source, runtime = Path(source), runtime or Runtime(device="cpu")
    trained = weights_of(source)
    if trained is None:
        return _exported(source, runtime)
    stored = artifact.load(trained, schema=SCHEMA)
    facts = stored.fields
    if teacher is None and not facts.get("model"):
        raise UserError(f"{printable(source, 300)} does not say which teacher it belongs to; give `teacher`")
    if teacher is None or isinstance(teacher, str):
        teacher = load(teacher or facts["model"], runtime, **loading)
    model = teacher if isinstance(teacher, DiffusionModel) else None
    if model is not None and facts.get("model_fingerprint", model.fingerprint) != model.fingerprint:
        raise IncompatibleModelError(
            f"{printable(model.name)} is not the model that this generator was distilled from, which was called "
            f"{printable(facts['model_name'])}; point to that one with `model`"
        )
    plain = teacher.denoiser if isinstance(teacher, DiffusionModel) else teacher
    if lora := facts.get("lora"):
        denoiser = LoraDenoiser(plain, **lora)
    elif channels := facts.get("channels"):
        denoiser = with_channels(plain, channels)
    else:
        denoiser = copy.deepcopy(plain)
    own = _tensors(denoiser)
    if sorted(own) != sorted(stored.tensors) or any(own[n].shape != v.shape for n, v in stored.tensors.items()):
        raise UserError(
            f"the weights in {printable(source, 300)} do not fit the teacher's {type(plain.backbone).__name__}; "
            "give the teacher that it was distilled from"
        )
    for name, value in stored.tensors.items():
        own[name].copy_(value)
    return StoredGenerator(OneStepGenerator(denoiser, facts["t"]).requires_grad_(False).eval(), facts, model)


def weights_of(source: Path) -> Path | None:
    """Returns the file of weights that a path stands for; None for an exported folder.

    Args:
        source: Run folder of a training, folder `generator` in it, or file.

    Raises:
        UserError: There is nothing of the kind.
    """
    for folder in (source / NAME, source):
        if (folder / f"{NAME}.json").is_file():
            return folder / f"{NAME}.safetensors"
    if source.is_dir():
        return None
    path = source.with_suffix(".safetensors")
    if not path.is_file():
        raise UserError(
            f"{printable(source, 300)} is no generator; give the run folder of a finished training, a safetensors file "
            "of one, or a folder that export wrote"
        )
    return path


def _exported(folder: Path, runtime: Runtime) -> StoredGenerator:
    if not (folder / CARD).is_file():
        raise UserError(
            f"{printable(folder, 300)} holds no generator: neither a finished training's, nor {CARD}, which a folder "
            "that export wrote has"
        )
    stated = read_untrusted(folder / CARD)
    t = stated.get("t")
    if not isinstance(t, int | float) or not t >= 0:
        raise UserError(f"{printable(folder / CARD, 300)} says t = {printable(t)}, which is no level; export it again")
    if "lora" in stated:
        raise UserError(
            f"{printable(folder, 300)} holds a LoRA for pipelines; give the run folder that it was exported from"
        )
    model = load(folder, runtime)
    facts = stated if isinstance(stated.get("training"), dict) else {**stated, "training": {}}
    generator = OneStepGenerator(model.denoiser, t)
    _require_unchanged(folder, stated, self_test(model, generator))
    return StoredGenerator(generator, facts, model)


@torch.no_grad()
def self_test(model: DiffusionModel, generator: OneStepGenerator) -> list[float] | None:
    """Returns some numbers of g(z) for the latent of seed 0, and the empty prompt or class 0.

    An exported folder keeps them, and whoever reads it can see whether it still draws what it drew.

    Args:
        model: Model whose network the generator calls.
        generator: Generator that is tested; None comes back where its text encoders are missing.
    """
    try:
        given = {key: value.to(model.device) for key, value in model.empty_condition(1).items()}
    except IncompatibleModelError:
        return None
    found = generator(row_noise(0, range(1), model.shape).to(model.device), given).float().flatten()
    places = torch.linspace(0, len(found) - 1, min(_TESTED, len(found))).round().long()
    return found.cpu()[places].tolist()


def _require_unchanged(folder: Path, stated: Mapping[str, Any], found: list[float] | None) -> None:
    """Raises where a folder does not draw what it drew when it was written."""
    kept = stated.get("self_test")
    if kept is None or found is None:
        return
    allowed = max(TOLERANCE.get(str(stated.get("dtype")), 0.0), _OTHER_MACHINE * TOLERANCE["float32"])
    known = isinstance(kept, list) and len(kept) == len(found) and all(isinstance(one, int | float) for one in kept)
    apart = max(abs(one - other) for one, other in zip(kept, found, strict=True)) if known else math.inf
    if not known or not apart <= allowed * max(1.0, *(abs(one) for one in kept)):
        raise CorruptArtifactError(
            f"{printable(folder, 300)} draws other samples than when it was exported (they differ by {apart:.2g}): its "
            "weights or settings were changed since; export it again"
        )


def _tensors(denoiser: Denoiser) -> dict[str, Tensor]:
    """Returns what is stored of a generator's network, as the tensors that it calls."""
    if isinstance(denoiser, LoraDenoiser):
        parts = ((name, zip("AB", pair, strict=True)) for name, pair in denoiser.factors.items())
        return {f"{name}.lora_{letter}.weight": part for name, pair in parts for letter, part in pair}
    assert isinstance(denoiser, NetworkDenoiser)
    return denoiser.backbone.state_dict()


def _schedule(model: DiffusionModel) -> dict[str, Any]:
    schedule = model.denoiser.schedule
    plain = {name: value for name, value in vars(schedule).items() if isinstance(value, bool | int | float | str)}
    return {"kind": type(schedule).__name__, **plain}
