"""The commands `diffcore adapter`: look into LoRA files and convert them. Heavy imports stand inside the commands."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cyclopts import App

from diffcore.cli.app import emit
from diffcore.cli.options import Flag

if TYPE_CHECKING:
    from diffcore.adapters import Adapter

adapter_app = App(
    name="adapter",
    help="Look into LoRA files, and convert them so that other tools read them with the same effect.\n\n"
    "Start with: diffcore adapter info FILE",
)


@adapter_app.command
def info(file: Path, *, model: Path | None = None, json: Flag = False) -> int:
    """Describe an adapter: naming convention, modules, ranks, alphas, size, and the base models that it fits.

    Shortest form: diffcore adapter info FILE

    A file that is damaged, or no LoRA, is refused with the reason, exit code 2.

    Args:
        file: Safetensors file, or folder in PEFT's layout.
        model: Model to test the adapter on; exit code 1 if it does not fit. Without one, sd15, sd21 and sdxl are tried.
        json: Print one JSON object, with every module.
    """
    from diffcore.models.describe_adapter import describe_adapter

    told = describe_adapter(file, model)
    emit(told if json else _in_lines(told), json)
    return 0 if told["misfit"] is None else 1


@adapter_app.command
def convert(
    file: Path,
    out: Path,
    *,
    format: Literal["diffusers", "kohya", "peft"] = "diffusers",
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    model: Path | None = None,
    overwrite: Flag = False,
    json: Flag = False,
) -> int:
    """Write an adapter in another layout; strengths are folded into the factors, so that every tool applies the same.

    Shortest form: diffcore adapter convert FILE OUT.safetensors --format kohya

    The written file is read back and compared with the source, module by module.

    Args:
        file: Safetensors file, or folder in PEFT's layout.
        out: File to write, ending in .safetensors; for peft a folder.
        format: diffusers for load_lora_weights, kohya for web UIs, peft for PeftModel.from_pretrained.
        dtype: Precision to write; by default the source's where it is exact, else float32.
        model: Base model; without one, sd15, sd21 and sdxl are tried.
        overwrite: Replace an adapter that exists already.
        json: Print one JSON object.
    """
    import torch

    from diffcore.adapters import read_adapter, scan_adapter, write_adapter
    from diffcore.models.bases import base_for

    base = base_for(scan_adapter(file), model)
    adapter = read_adapter(file, base)
    chosen = None if dtype is None else getattr(torch, dtype)
    written = write_adapter(adapter, out, format=format, dtype=chosen, base=base, overwrite=overwrite)
    error = _largest_error(adapter, read_adapter(written, base))
    told = {"written": written, "format": format, "base": base.name, "modules": len(list(adapter))}
    emit({**told, "largest_relative_error": error}, json)
    return 0


def _largest_error(adapter: "Adapter", written: "Adapter") -> float:
    return max(change.relative_error(written.components[component][module]) for component, module, change in adapter)


def _in_lines(told: dict[str, Any]) -> dict[str, Any]:
    """Returns the description without its rows, counts as words."""
    lines = {name: value for name, value in told.items() if name not in ("changes", "misfit")}
    for name in ("ranks", "alphas"):
        lines[name] = ", ".join(f"{value} ({count} modules)" for value, count in told[name].items())
    lines["fits"] = ", ".join(told["fits"]) or told["misfit"] or "none of sd15, sd21, sdxl; name a base with --model"
    return lines | {"parameters": f"{told['parameters']:,}"}
