"""The commands that turn adapters into points, and points into adapters: project, export."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from diffcore.cli import Flag, emit
from diffcore.errors import UserError
from w2w_space.app.options import BaseModel, DirectionsPath, FormatName, Overwrite, PrecisionName, SpacePath, Subject

if TYPE_CHECKING:
    from diffcore.models import DiffusionModel
    from w2w_space.coordinates import Point, Space

_NEAREST, _SHOWN = 3, 5


def project(
    space: SpacePath,
    adapter: Path,
    *,
    directions: DirectionsPath | None = None,
    unshrink: Flag = False,
    out: Path | None = None,
    model: BaseModel = None,
    json: Flag = False,
) -> int:
    """Find the point of a space that is nearest to an adapter: its coordinates, and what the space does not hold.

    Shortest form: w2w-space project SPACE ADAPTER

    Args:
        adapter: LoRA file, or folder in PEFT's layout.
        directions: Run folder of directions; the place on each of their axes is told, as a description.
        unshrink: Lengthen the coordinates, which of adapters that were not in the fit are too short.
        out: File to write the point to, ending in .safetensors.
        json: Print the result as one JSON object, with all coordinates and the residual of every module.
    """
    from w2w_space.app.inputs import adapter_of, ranked
    from w2w_space.edit import edit
    from w2w_space.files.directions import load_directions
    from w2w_space.files.points import save_point
    from w2w_space.files.space import load_any_space

    loaded = load_any_space(space)
    read = adapter_of(adapter, loaded, space, model)
    point = loaded.project(read, unshrink=unshrink)
    # What other ranks lose is part of what the space does not hold: compared is the file, not its vector.
    changes = point.adapter().modules
    residuals = {name: change.relative_error(changes[name]) for name, change in read.modules.items() if name in changes}
    told = {**about_point(point), "residual": point.residual}
    worst = max(residuals, key=lambda name: residuals[name])
    told |= {"worst_module": worst, "worst_residual": residuals[worst]}
    told["modules_outside"] = len(set(read.modules) - set(changes))
    if directions is not None:
        places = edit(point, {}, load_directions(directions, loaded)).places
        told["places"] = {p.name: f"{p.after:+.2f} sd{ranked(p.percentile)}" for p in places}
    if json:
        told |= {"coordinates": point.z.tolist(), "residuals": residuals}
    if out is not None:
        if out.suffix != ".safetensors":
            raise UserError(f"`out` is {str(out)!r}; name a file that ends in .safetensors")
        told["point"] = save_point(point, out, name=adapter.stem, source=adapter.name)
    emit(told, json)
    return 0


def about_point(point: "Point") -> dict[str, Any]:
    """Returns where a point lies: its length, its largest coordinates, and the members that are nearest to it.

    Args:
        point: Point of a space.
    """
    from w2w_space.sample import described

    space = point.space
    place = described(space, point.z[None], projected=point.projected)[0]
    largest = point.z.abs().argsort(descending=True)[:_SHOWN].tolist()
    return {
        "distance_from_mean": point.length,
        "usual_distance": _usual(space),
        "percentile_of_distance": place.typical if space.names else None,
        "largest_coordinates": [f"{place + 1}: {float(point.z[place]):+.2f}" for place in largest],
        "nearest_members": _nearest(point),
    }


def _usual(space: "Space") -> float:
    """Returns the root mean square length of members, in standard deviations."""
    n = len(space.names)
    return (space.num_components * ((n - 1) / n if n else 1.0)) ** 0.5


def _nearest(point: "Point") -> list[str]:
    from w2w_space.diagnose import members_by_distance

    if not point.space.names:
        return []
    return [f"{name} ({distance:.2f})" for name, distance in members_by_distance(point)[:_NEAREST]]


def export(
    space: SpacePath,
    subject: Subject,
    out: Path,
    *,
    format: FormatName = "diffusers",
    dtype: PrecisionName | None = None,
    keep_scale: float = 1.0,
    merge: str | None = None,
    weight: float = 1.0,
    verify: str | None = None,
    unshrink: Flag = False,
    model: BaseModel = None,
    card: Annotated[bool, Parameter(negative="--no-card")] = True,
    overwrite: Overwrite = False,
    json: Flag = False,
) -> int:
    """Write a point of a space as a LoRA that every tool applies at its strength, or merged into its model.

    Shortest form: w2w-space export SPACE SUBJECT OUT.safetensors

    What is written is read back and compared. Exit code 1 means that --verify found another effect.

    Args:
        out: File to write, ending in .safetensors; for peft and with --merge a folder.
        format: Use diffusers for load_lora_weights, kohya for web UIs, peft for PeftModel.from_pretrained.
        dtype: Precision to write; by default float16 where it holds the numbers.
        keep_scale: Strength alpha / rank that the file states; 27 is the authors' convention. Tools that read no alpha
            show any other than 1 wrongly.
        merge: Model that the point is merged into; its whole checkpoint is written.
        weight: Strength of the change in the merged model.
        verify: Base model, a pipeline, in which plain diffusers must show the point that was written.
        unshrink: Lengthen the coordinates of an adapter that was not in the fit.
        card: Write a page beside the adapter that says what it is.
        json: Print the result as one JSON object.
    """
    import torch

    from diffcore.adapters.settings import MAX_ALPHA
    from w2w_space.app.inputs import subject as subject_of
    from w2w_space.files.export import export_point, merge_point
    from w2w_space.files.space import base_of_space, load_any_space

    if verify is not None and (format == "peft" or merge is not None):
        raise UserError("`verify` loads files in the layout of diffusers or kohya; choose one of them as `format`")
    if merge is not None and keep_scale != 1:
        raise UserError("`keep_scale` is for files of adapters; a merged model has none, leave it out")
    if not 0 < keep_scale <= MAX_ALPHA:
        raise UserError(f"`keep_scale` is {keep_scale:g}; give a strength above 0, such as the authors' 27")
    loaded = load_any_space(space)
    point = subject_of(subject, loaded, space, model=model, unshrink=unshrink)
    if merge is not None:
        emit({"written": merge_point(load_plain(merge), point, out, weight=weight)}, json)
        return 0
    base = base_of_space(space)
    written = export_point(
        point,
        out,
        format=format,
        dtype=None if dtype is None else getattr(torch, dtype),
        base=base,
        overwrite=overwrite,
        scale=keep_scale,
        card={"subject": Path(subject).stem, "base": base.name} if card else None,
    )
    told = {"written": written.path, "precision": str(written.dtype).removeprefix("torch.")}
    told |= {"largest_rounding_error": written.error, "card": written.card, **about_point(point)}
    shown = None
    if verify is not None:
        from w2w_space.files.verify import shown_by_diffusers

        shown = shown_by_diffusers(load_plain(verify), point, written.path)
        told |= {"effect": shown.effect, "error_in_diffusers": shown.error}
    emit(told, json)
    return 1 if shown is not None and not shown.equal else 0


def load_plain(model: str) -> "DiffusionModel":
    """Returns a model on the CPU in float32.

    Args:
        model: Name on the command line.
    """
    from diffcore.models import load
    from diffcore.runtime import Runtime

    return load(model, Runtime(device="cpu"))
