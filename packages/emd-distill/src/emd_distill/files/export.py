"""Writing a one-step generator as a folder that diffusers loads by itself, with a card, and reading it back."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from diffcore.adapters import write_adapter
from diffcore.denoiser import Condition
from diffcore.denoiser.library import library_class
from diffcore.errors import IncompatibleModelError, MachineError, UserError, printable
from diffcore.io.jsonfile import write_json, write_text
from diffcore.models import DiffusionModel, backbone_call
from diffcore.models.save import new_folder, write_backbone
from diffcore.noise import row_noise
from emd_distill.export import OneStepModel, largest_error, one_step_model
from emd_distill.files.generators import CARD, TOLERANCE, self_test
from emd_distill.generator import OneStepGenerator
from emd_distill.lora import lora_of

LORA = "pytorch_lora_weights.safetensors"
"""File name that `load_lora_weights` looks for in a folder."""
Precision = Literal["float32", "float16", "bfloat16"]
_ROWS = 2  # latents that the folder is compared on


@dataclass(frozen=True)
class Exported:
    """A folder that was written.

    Attributes:
        folder: Place of the folder.
        scheduler: Class name of its scheduler; None for the folder of a bare network.
        t: Level at which the generator is called, in the units of the teacher's schedule.
        error: Largest difference between what the folder draws in one step and g(z), relative to the largest value of
            g(z) or 1; None where it was not compared.
    """

    folder: Path
    scheduler: str | None
    t: float
    error: float | None


def export(
    model: DiffusionModel,
    generator: OneStepGenerator,
    folder: Path,
    *,
    dtype: Precision = "float32",
    licence: str | None = None,
    training: Mapping[str, Any] | None = None,
    condition: Condition | None = None,
    verify: bool = True,
) -> Exported:
    """Writes a generator as an ordinary folder of diffusers, reads it back, and compares what it draws with g(z).

    A pipeline becomes a pipeline folder that draws in one step with `num_inference_steps=1, guidance_scale=1.0`; a bare
    network becomes its folder, with the few lines that call it in the card. The folder appears only after it was
    compared.

    Args:
        model: Model of the teacher, whose codec and text encoders go with the generator.
        generator: Trained generator of the same architecture.
        folder: Place of the new folder; nothing may be there yet.
        dtype: Precision of the written weights.
        licence: Licence of the teacher's weights, which binds the generator too.
        training: Plain values that say how it was trained, for the card.
        condition: Keyword tensors of one row that the comparison uses; by default the empty prompt or class 0.
        verify: Whether the folder is read back and compared.

    Raises:
        UserError: Something is there already, or the model's pipeline cannot call the network as the generator does.
        MachineError: The folder that was read back does not draw what the generator draws.

    Example:
        >>> from tempfile import mkdtemp
        >>> from diffcore.models import from_pipeline
        >>> from diffcore.testing import tiny
        >>> teacher = from_pipeline(tiny.pipeline("dit"))
        >>> student = OneStepGenerator(copy.deepcopy(teacher.denoiser), 999)
        >>> export(teacher, student, Path(mkdtemp()) / "one-step").scheduler
        'LCMScheduler'
    """
    if dtype not in get_args(Precision):
        raise ValueError(f"`dtype` is {dtype!r}; it must be one of {', '.join(get_args(Precision))}")
    made = one_step_model(model, generator)
    written = made.model if dtype == _named(model.dtype) else _in_precision(made.model, getattr(torch, dtype))
    scheduler = None if model.pipeline_class is None else type(written.scheduler).__name__
    stated = {"t": generator.t, "teacher": model.name, "teacher_fingerprint": model.fingerprint, "dtype": dtype}
    stated |= {"licence": licence, "scheduler": scheduler, "training": dict(training or {})}
    error = None
    with new_folder(Path(folder)) as partial:
        if model.pipeline_class is not None:
            written.pipeline.save_pretrained(partial, safe_serialization=True)
        else:
            write_backbone(written, partial)
        if verify:
            error = _checked(folder, _error_of(partial, made, dtype, condition), dtype)
        write_json(partial / CARD, {**stated, "error": error, "self_test": self_test(made.model, generator)})
        write_text(partial / "README.md", card(made, stated, error))
    return Exported(Path(folder), scheduler, generator.t, error)


def export_lora(
    model: DiffusionModel,
    generator: OneStepGenerator,
    folder: Path,
    *,
    dtype: Precision = "float32",
    licence: str | None = None,
    training: Mapping[str, Any] | None = None,
    condition: Condition | None = None,
    verify: bool = True,
) -> Exported:
    """Writes a generator that is a LoRA as a file for `load_lora_weights`, with the scheduler that goes with it.

    The folder holds `pytorch_lora_weights.safetensors`, `scheduler/` and a card. A pipeline of diffusers around the
    teacher reads them, and what it draws in one step is compared with g(z), before the folder appears.

    Args:
        model: Model of the teacher, a pipeline.
        generator: Trained generator around a `LoraDenoiser` on that model's weights.
        folder: Place of the new folder; nothing may be there yet.
        dtype: Precision of the written factors.
        licence: Licence of the teacher's weights, which binds the generator too.
        training: Plain values that say how it was trained, for the card.
        condition: Keyword tensors of one row that the comparison uses; by default the empty prompt.
        verify: Whether the file is read back and compared.

    Raises:
        UserError: The generator is no LoRA, something is there already, or the pipeline reads no LoRA.
        MachineError: The teacher with the file that was read back does not draw what the generator draws.

    Example:
        >>> from tempfile import mkdtemp
        >>> from diffcore.models import from_pipeline
        >>> from diffcore.testing import tiny
        >>> from emd_distill.lora import LoraDenoiser
        >>> teacher = from_pipeline(tiny.pipeline("sd15"))
        >>> student = OneStepGenerator(LoraDenoiser(teacher.denoiser, rank=2), 999)
        >>> done = export_lora(teacher, student, Path(mkdtemp()) / "lora")
        >>> sorted(path.name for path in done.folder.iterdir())
        ['README.md', 'emd-distill.json', 'pytorch_lora_weights.safetensors', 'scheduler']
    """
    if dtype not in get_args(Precision):
        raise ValueError(f"`dtype` is {dtype!r}; it must be one of {', '.join(get_args(Precision))}")
    lora = lora_of(generator)
    if lora is None:
        raise UserError("the generator has weights of its own and is no LoRA; export it as a model")
    kind = None if model.pipeline_class is None else library_class(model.pipeline_class)
    if kind is None or not hasattr(kind, "load_lora_weights"):
        raise IncompatibleModelError(f"{printable(model.name)} is no pipeline that reads LoRA files; export it merged")
    made = one_step_model(model, generator)
    stated = {"t": generator.t, "teacher": model.name, "teacher_fingerprint": model.fingerprint, "dtype": dtype}
    scheduler = made.model.scheduler
    stated |= {"licence": licence, "scheduler": type(scheduler).__name__, "training": dict(training or {})}
    stated["lora"] = {"rank": lora.rank, "alpha": lora.alpha, "targets": lora.targets}
    error = None
    with new_folder(Path(folder)) as partial:
        adapter = lora.adapter(model.backbone_name, printable(model.name))
        write_adapter(adapter, partial / LORA, dtype=getattr(torch, dtype))
        scheduler.save_pretrained(partial / "scheduler")
        if verify:
            error = _checked(folder, _lora_error(partial, model, made, condition), dtype)
        write_json(partial / CARD, {**stated, "error": error})
        write_text(partial / "README.md", card(made, stated, error))
    return Exported(Path(folder), stated["scheduler"], generator.t, error)


def _lora_error(folder: Path, model: DiffusionModel, made: OneStepModel, condition: Condition | None) -> float:
    """Returns how far the teacher's pipeline with the written file is from the generator."""
    z, given, wanted = _wanted(made, condition)
    shared = {id(part): part for part in model.backbone.parameters()}
    network = copy.deepcopy(model.backbone, shared)  # diffusers changes its modules
    pipe = model.with_modules("with a LoRA", {model.backbone_name: network}).pipeline
    pipe.load_lora_weights(folder)
    scheduler = library_class(type(made.model.scheduler).__name__).from_pretrained(folder / "scheduler")
    error = largest_error(network.eval(), scheduler, wanted, z, given, backbone_call(network))
    return error / max(float(wanted.abs().max()), 1.0)


def _checked(folder: Path, error: float, dtype: str) -> float:
    """Returns an error that is small enough, or raises."""
    if not error <= TOLERANCE[dtype]:
        raise MachineError(
            f"the written folder draws other samples than the generator: they differ by {error:.2g}, "
            f"{TOLERANCE[dtype]:g} is allowed in {dtype}; nothing was kept at {printable(folder, 300)}"
        )
    return error


def card(made: OneStepModel, stated: Mapping[str, Any], error: float | None) -> str:
    """Returns the model card of a folder, in Markdown with the header that model hubs read.

    Args:
        made: Generator and model that were written.
        stated: Facts about teacher, precision, licence, scheduler and training.
        error: Largest difference to g(z) that was measured; None where it was not.
    """
    head = {"library_name": "diffusers", "tags": ["one-step", "distillation", "emd-distill"]}
    head |= {"base_model": str(stated["teacher"])}
    head |= {"license": str(stated["licence"])} if stated["licence"] else {}
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", ""]
    lines += [f"# One-step generator from {stated['teacher']}", ""]
    lines += ["Draws in one network call what its teacher draws in many, distilled with `emd-distill`.", ""]
    lines += ["| | |", "|---|---|", f"| teacher | {stated['teacher']} |"]
    lines += [f"| licence of the teacher | {stated['licence'] or 'not stated; it binds this model too'} |"]
    lines += [f"| level t of the call | {stated['t']:g} |", f"| precision | {stated['dtype']} |"]
    lines += [f"| {key.replace('_', ' ')} | {value} |" for key, value in stated["training"].items()]
    if error is not None:
        lines += [f"| difference to the generator, measured on this folder | {error:.1e} |"]
    lines += [
        "",
        "## Use",
        "",
        "```python",
        *(_pipeline_lines if stated["scheduler"] else _network_lines)(made, stated),
    ]
    lines += ["```", ""]
    if stated["scheduler"]:
        lines += _settings(made, stated)
    return "\n".join(lines)


def _pipeline_lines(made: OneStepModel, stated: Mapping[str, Any]) -> list[str]:
    what = '["a photograph of a cat"]'
    if made.model.pipeline_class == "DiTPipeline":
        what = "class_labels=[207]"
    elif made.model.pipeline_class in ("DDPMPipeline", "DDIMPipeline"):
        what = "batch_size=1"
    guidance = "" if what == "batch_size=1" else ", guidance_scale=1.0"
    if "lora" in stated:
        return [
            "import torch",
            f"from diffusers import DiffusionPipeline, {stated['scheduler']}",
            "",
            f"pipe = DiffusionPipeline.from_pretrained({str(stated['teacher'])!r})  # the teacher",
            'pipe.load_lora_weights(".")  # in this folder',
            f'pipe.scheduler = {stated["scheduler"]}.from_pretrained("scheduler")',
            f"image = pipe({what}, num_inference_steps=1{guidance}).images[0]",
        ]
    return [
        "import torch",
        "from diffusers import DiffusionPipeline",
        "",
        f'pipe = DiffusionPipeline.from_pretrained("."{_dtype(stated)})  # in this folder',
        f"image = pipe({what}, num_inference_steps=1{guidance}).images[0]",
    ]


def _network_lines(made: OneStepModel, stated: Mapping[str, Any]) -> list[str]:
    name, model = type(made.model.backbone).__name__, made.model
    channels = model.shape[0]
    shape = ", ".join(map(str, model.shape))
    given = [_literal(key, value) for key, value in model.empty_condition(1).items()]
    factor = "z" if made.network_factor == 1 else f"{made.network_factor!r} * z"
    entries = "".join(f", {entry}" for entry in given)
    return [
        "import torch",
        f"from diffusers import {name}",
        "",
        f'network = {name}.from_pretrained("."{_dtype(stated)}).eval()  # in this folder',
        f"z = torch.randn(1, {shape}, dtype=network.dtype)",
        "with torch.no_grad():",
        f"    output = network({factor}, torch.tensor([{made.network_time!r}]){entries}).sample[:, :{channels}]",
        f"x0 = {made.input_factor!r} * z + {made.output_factor!r} * output",
    ]


def _dtype(stated: Mapping[str, Any]) -> str:
    return "" if stated["dtype"] == "float32" else f", dtype=torch.{stated['dtype']}"


def _literal(key: str, value: Tensor) -> str:
    if value.is_floating_point():
        return f"{key}=torch.zeros({', '.join(map(str, value.shape))})"
    return f"{key}=torch.tensor({value.tolist()})"


def _settings(made: OneStepModel, stated: Mapping[str, Any]) -> list[str]:
    t, last = stated["t"], made.generator.denoiser.schedule
    lines = [
        "## Settings that matter",
        "",
        "* One step, and no guidance: `guidance_scale=1.0`. More steps do not help; the network knows one level.",
        f"* The scheduler in this folder ({stated['scheduler']}) is part of the model. Euler, DPM-Solver++, UniPC, and "
        "DDIM without `set_alpha_to_one` start elsewhere or do not end at clean data, and draw something else.",
    ]
    total = getattr(last, "num_timesteps", None)
    if total is not None and t == total - 1:
        lines += ["* In web UIs: sampler LCM, 1 step, CFG scale 1. These were not tried here."]
    elif total is not None:
        lines += [
            f"* Web UIs start one step at timestep {total - 1}, and this generator is called at {t:g}: use diffusers."
        ]
    if stated["dtype"] != "float32" and "lora" not in stated:
        lines += [f"* The weights are in {stated['dtype']}: load them with that `dtype`, or parts will not fit."]
    return [*lines, ""]


def _error_of(folder: Path, made: OneStepModel, dtype: str, condition: Condition | None) -> float:
    """Reads a folder with diffusers alone and returns how far it is from the generator."""
    model = made.model
    z, given, wanted = _wanted(made, condition)
    device, precision = z.device, getattr(torch, dtype)
    if model.pipeline_class is None:
        network = library_class(type(model.backbone).__name__).from_pretrained(folder, dtype=precision)
        network = network.to(device).eval()
        with torch.no_grad():
            x, t = made.network_factor * z.to(precision), torch.full((_ROWS,), made.network_time, device=device)
            cast = {key: value.to(precision) if value.is_floating_point() else value for key, value in given.items()}
            output = backbone_call(network)(network, x, t, cast)
            output = (output if isinstance(output, Tensor) else output[0])[:, : z.shape[1]].float()
        error = float((made.input_factor * z + made.output_factor * output - wanted).abs().max())
    else:
        pipe = library_class("DiffusionPipeline").from_pretrained(folder, dtype=precision)
        _require_equal(pipe, model, precision)
        network = getattr(pipe, model.backbone_name).to(device).eval()
        error = largest_error(network, pipe.scheduler, wanted, z, given, backbone_call(network))
    return error / max(float(wanted.abs().max()), 1.0)


def _wanted(made: OneStepModel, condition: Condition | None) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Returns latents, conditions and the generator's samples that a folder is compared on."""
    device = next(made.generator.parameters()).device
    z = row_noise(0, range(_ROWS), made.model.shape).to(device)
    one = made.model.empty_condition(1) if condition is None else condition
    given = {key: value.expand(_ROWS, *value.shape[1:]).to(device) for key, value in one.items()}
    with torch.no_grad():
        return z, given, made.generator(z, given)


def _require_equal(pipe: Any, model: DiffusionModel, precision: torch.dtype) -> None:
    """Raises where a network that was read back has other weights than the one that was written."""
    for name, module in model.modules.items():
        if not isinstance(module, nn.Module):
            continue
        read = getattr(pipe, name).state_dict()
        for key, value in module.state_dict().items():
            expected = value.to(precision) if value.is_floating_point() else value
            if key in read and not torch.equal(read[key].to(expected).cpu(), expected.cpu()):
                raise MachineError(f"{name} was read back with another {key}; nothing was kept, try again")


def _in_precision(model: DiffusionModel, dtype: torch.dtype) -> DiffusionModel:
    """Returns a model whose networks are copies in another precision."""
    networks = {k: copy.deepcopy(m).to(dtype) for k, m in model.modules.items() if isinstance(m, nn.Module)}
    return replace(model.with_modules(f"in {dtype}", networks), components=model.components)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def refuse_taken(folder: Path) -> None:
    """Raises where something is at the place of a new folder, before anything is computed for it.

    Args:
        folder: Place of the new folder.
    """
    if folder.exists() or folder.is_symlink():
        raise UserError(f"{printable(folder, 300)} is there already; choose another folder")
