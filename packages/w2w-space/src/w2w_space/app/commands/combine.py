"""The commands that write adapters to be added: compose, slider."""

import json as json_module
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from diffcore.cli import Flag, emit
from diffcore.errors import UserError, printable
from w2w_space.app.options import DirectionsPath, FormatName, Overwrite, PrecisionName, SpacePath, Subject

if TYPE_CHECKING:
    from diffcore.adapters import Adapter, Base
    from w2w_space.space import Point, WeightSpace

Parts = Annotated[
    tuple[str, ...],
    Parameter(
        negative="",
        help="Adapters, and with a space its points, each with its weight, such as a.safetensors b.safetensors:0.7.",
    ),
]


def compose(
    space_or_model: Annotated[str, Parameter(help="Space, or base model: pipeline folder, file, or zoo:NAME.")],
    parts: Parts,
    *,
    out: Path,
    rank: int | None = None,
    format: FormatName = "diffusers",
    dtype: PrecisionName | None = None,
    overwrite: Overwrite = False,
    json: Flag = False,
) -> int:
    """Add adapters to one adapter: the exact sum of their changes, each times its weight.

    Shortest form: w2w-space compose SPACE alice style.safetensors:0.7 --out OUT.safetensors

    With a space it is told first how much of each added file lies in the span of the space. Several points of the space
    are added as points, as deviations from the mean: that is another subject, and no merge.

    Args:
        out: File to write, ending in .safetensors; for peft a folder.
        rank: Rank of every module; by default as many as all have together, which loses nothing.
        format: Use diffusers for load_lora_weights, kohya for web UIs, peft for PeftModel.from_pretrained.
        dtype: Precision to write; by default the sources' where it is exact, else float32.
        json: Print the result as one JSON object, with the loss of every module.
    """
    import torch

    from diffcore.adapters import write_adapter
    from diffcore.models import resolve
    from diffcore.models.bases import base_on_disk
    from w2w_space.app.inputs import about_losses, read_back
    from w2w_space.compose import compose as add
    from w2w_space.files.space import base_of_space, is_space, load_space

    if rank is not None and rank < 1:
        raise UserError(f"`rank` is {rank}; give at least 1")
    wanted = [_weighted(part) for part in parts]
    place = Path(space_or_model)
    told: dict[str, Any] = {}
    if is_space(place):
        base, warnings = base_of_space(place), []
        adapters, weights = _of_space(load_space(place), place, wanted, told, warnings)
        told["warnings"] = warnings
    else:
        if not place.exists() and not space_or_model.startswith("zoo:"):
            raise UserError(f"{printable(place, 300)} is neither a space nor a base model; give one of the two first")
        base = base_on_disk(resolve(space_or_model))
        adapters, weights = _of_files(base, wanted), [weight for _, weight in wanted]
    done = add(adapters, weights, rank=rank, name=out.stem)
    chosen = None if dtype is None else getattr(torch, dtype)
    written = write_adapter(done.adapter, out, format=format, dtype=chosen, base=base, overwrite=overwrite)
    told = {"written": written, "modules": len(list(done.adapter)), **told}
    told |= {"rank": max(change.rank for _, _, change in done.adapter)}
    told |= {"largest_rounding_error": read_back(done.adapter, written, base), **about_losses(done.losses, each=json)}
    emit(told, json)
    return 0


def _of_files(base: "Base", wanted: list[tuple[str, float]]) -> "list[Adapter]":
    from diffcore.adapters import read_adapter

    return [read_adapter(Path(word), base) for word, _ in wanted]


def _of_space(
    space: "WeightSpace", place: Path, wanted: list[tuple[str, float]], told: dict[str, Any], warnings: list[str]
) -> "tuple[list[Adapter], list[float]]":
    """Returns what is added, points as one, and tells the share of each file inside the space before."""
    from w2w_space.app.inputs import adapter_of, subject
    from w2w_space.compose import FOREIGN, combined, share_inside
    from w2w_space.files.points import is_point

    points: list[tuple[Point, float]] = []
    adapters, weights, shares = list[Any](), list[float](), dict[str, float]()
    for word, weight in wanted:
        path = Path(word)
        if word in space.names or word == "mean" or is_point(path) or not path.exists():
            points.append((subject(word, space, place), weight))
            continue
        adapters.append(adapter_of(path, space, place, None))
        weights.append(weight)
        share = shares[word] = share_inside(space, adapters[-1])
        print(f"{printable(word)}: {share:.1%} of its squared norm lies in the span of the space", file=sys.stderr)
        if share > FOREIGN:
            warnings.append(
                f"{share:.0%} of {path.name} lies in the span of the space: a sum with a subject of the space is a "
                "third subject, and not both"
            )
    if len(points) > 1:
        warnings.append(
            f"{len(points)} points of one space were added as points: that is another subject, and not a merge of them"
        )
        points = [(combined([p for p, _ in points], [w for _, w in points]), 1.0)]
        told["distance_from_mean"] = points[0][0].length
    for point, weight in points:
        adapters.insert(0, point.adapter())
        weights.insert(0, weight)
    if shares:
        told["shares_inside"] = shares
    return adapters, weights


def _weighted(part: str) -> tuple[str, float]:
    """Returns name and weight of words such as style.safetensors:0.7; a colon of a path is no weight."""
    name, colon, tail = part.rpartition(":")
    if not colon or not name:
        return part, 1.0
    try:
        weight = float(tail)
    except ValueError:
        return part, 1.0
    if not abs(weight) < float("inf"):
        raise UserError(f"{printable(part)!r} has the weight {tail}; give a finite number, such as :0.7")
    return name, weight


def slider(
    space: SpacePath,
    attribute: Annotated[str, Parameter(help="Attribute that the slider moves: the name of a direction.")],
    out: Path,
    *,
    directions: DirectionsPath,
    subject: Subject = "mean",
    at: float = 1.0,
    keep: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = (),
    rank: int | None = None,
    format: FormatName = "diffusers",
    dtype: PrecisionName | None = None,
    overwrite: Overwrite = False,
    json: Flag = False,
) -> int:
    """Write a direction as a LoRA of its own, whose strength in any tool is a slider in standard deviations.

    Shortest form: w2w-space slider SPACE age OUT.safetensors --directions RUN

    Load it beside the subject's LoRA. At the strength --at it equals the edit exactly; the useful range of strengths is
    printed, and kept in the header of the file.

    Args:
        out: File to write, ending in .safetensors; for peft a folder.
        directions: Run folder of directions, or its directions.safetensors.
        at: Strength in standard deviations at which slider and edit are equal; 0 for the slope at the subject.
        keep: Attributes whose scores stay as they are.
        rank: Rank of the slider; by default twice the space's, which loses nothing.
        format: Use diffusers for load_lora_weights, kohya for web UIs, peft for PeftModel.from_pretrained.
        dtype: Precision to write; by default float32.
        json: Print the result as one JSON object, with the loss of every module.
    """
    import torch

    from diffcore.adapters import write_adapter
    from w2w_space.app.inputs import about_losses, read_back
    from w2w_space.app.inputs import subject as subject_of
    from w2w_space.files.directions import load_directions
    from w2w_space.files.sliders import METADATA, about_slider
    from w2w_space.files.space import base_of_space, load_space
    from w2w_space.slider import slider as made_of

    if rank is not None and rank < 1:
        raise UserError(f"`rank` is {rank}; give at least 1")
    loaded, base = load_space(space), base_of_space(space)
    point = subject_of(subject, loaded, space)
    made = made_of(point, attribute, load_directions(directions, loaded), at=at, keep=keep, rank=rank)
    losses = about_losses(made.losses, each=json)
    about = about_slider(made, point, subject_name=Path(subject).stem, keep=keep) | {"loss": losses.get("loss", 0.0)}
    written = write_adapter(
        made.adapter,
        out,
        format=format,
        dtype=None if dtype is None else getattr(torch, dtype),
        base=base,
        overwrite=overwrite,
        metadata={METADATA: json_module.dumps(about, sort_keys=True)},
    )
    told = {"written": written, "unit": about["unit"], "useful_range": about["useful_range"], "exact_at": at}
    told |= {"rank": next(iter(made.adapter.modules.values())).rank, **losses}
    emit(told | {"largest_rounding_error": read_back(made.adapter, written, base)}, json)
    return 0
