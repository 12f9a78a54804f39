"""The commands that move in a space: directions, sample, edit."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from diffcore.cli import Flag, Job, Output, emit
from diffcore.errors import UserError, printable
from w2w_space.app.options import (
    AskedFor,
    BaseModel,
    DirectionsPath,
    Drawing,
    FormatName,
    Overwrite,
    RenderModel,
    ScorerName,
    SpacePath,
    Subject,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from diffcore.run import Run, RunMap
    from w2w_space.coordinates import Point, Space
    from w2w_space.labels import Labels

Strengths = Annotated[
    tuple[str, ...],
    Parameter(consume_multiple=True, negative="", help="Attributes and strengths, such as age=+1.5 beard=-2."),
]


def directions(
    space: SpacePath,
    labels: Path | None = None,
    *,
    probe: RenderModel = None,
    scorer: ScorerName = None,
    attribute: AskedFor = (),
    estimator: Literal["conditional", "mean", "normal", "ridge", "logistic"] = "conditional",
    ridge: float = 1e3,
    drawing: Drawing = Drawing(),
    output: Output = Output(),
) -> int:
    """Find the directions of attributes from labels of the members, or from what a judge sees in their pictures.

    Shortest form: w2w-space directions SPACE LABELS.csv

    Without labels: w2w-space directions SPACE --probe MODEL --scorer zoo:portraits-oracle --prompt PROMPT

    RUN/directions.safetensors is what edit and sample take. It is said how far each direction can be trusted.

    Args:
        labels: CSV file of adapter, attribute, value; or of adapter and one column per attribute. Blanks are unknown.
        estimator: Use conditional for what an attribute adds where the others stay the same, normal for the paper's.
        ridge: Penalty of the estimator ridge.
    """
    from diffcore.cli.app import settings
    from diffcore.io.files import sha256
    from w2w_space.app.report import save_directions_parts, write_page
    from w2w_space.directions import find_directions, held_out_leaks
    from w2w_space.files.directions import FILE, save_directions
    from w2w_space.files.labels import read_labels
    from w2w_space.files.space import load_any_space

    if (labels is None) == (probe is None):
        raise UserError("give `labels`, or `probe` with a `scorer`, and not both")
    if (probe is None) != (scorer is None):
        raise UserError("`probe` and `scorer` belong together: a model that draws, and a judge of what it draws")
    loaded = load_any_space(space)
    options: dict[str, Any] = {"space": space, "labels": labels, "estimator": estimator, "ridge": ridge}
    inputs = {"space": loaded.fingerprint}
    model: Any = None
    asked: Any = None
    drawn: dict[str, Any] = {}
    told: Labels | None = None
    if labels is not None:
        told = read_labels(labels, loaded)
        inputs[printable(labels.name)] = sha256(labels)
        plan = {"members": len(loaded.names), "attributes": ", ".join(told.attributes)}
        name = labels.stem
    else:
        from w2w_space.app.drawing import drawing_model, scorer_named

        assert probe is not None  # by the check above
        assert scorer is not None
        asked = scorer_named(scorer, attribute, drawing.device)
        model, drawn = drawing_model(probe, drawing)
        inputs |= {model.name: model.fingerprint, "scorer": asked.digest}
        options |= settings(probe=probe, scorer=scorer, attribute=list(attribute), drawing=drawing)
        pictures = len(loaded.names) * drawing.num_seeds * max(len(drawing.prompt), len(drawn.get("labels", ())), 1)
        plan = {"members": len(loaded.names), "pictures": pictures, "attributes": ", ".join(asked.attributes)}
        name = model.name

    def compute(run: "Run", map: "RunMap") -> dict[str, Any]:
        known, left = (told, list[str]()) if told is not None else _probed(run, map, loaded, model, asked, drawn)
        found = find_directions(loaded, known, estimator=estimator, ridge=ridge)
        save_directions(found, run.folder / FILE, labels=labels.name if labels is not None else f"probed by {scorer}")
        leaks = held_out_leaks(loaded, known, estimator=estimator, ridge=ridge)
        save_directions_parts(run, found, loaded, leaks)
        best = max(found.rows, key=lambda row: row.auc)
        return {
            "answer": f"{len(found.rows)} directions; held-out members are told best along {best.name!r} "
            f"({best.auc:.2f}).",
            "merit": {row.name: row.auc for row in found.rows},
            "notes": [*left, *found.notes],
        }

    job = Job("w2w-space directions", output.out or Path("runs") / f"directions-{name}", output, options, inputs)
    return job(compute, plan=plan, report=write_page)


def _probed(
    run: "Run", map: "RunMap", space: "Space", model: Any, scorer: Any, drawn: dict[str, Any]
) -> "tuple[Labels, list[str]]":
    """Returns the labels that a judge gives the members, and keeps them as a table that can be read as labels."""
    from w2w_space.probe import probe

    found, left = probe(model, space, scorer, map=map, **drawn)
    rows = [
        {"adapter": name, **dict(zip(found.attributes, values, strict=True))}
        for name, values in zip(space.names, found.values.tolist(), strict=True)
    ]
    run.table("labels", rows)
    return found, left


def sample(
    space: SpacePath,
    out: Path,
    *,
    num: int = 8,
    method: Literal["gaussian", "mixture", "bootstrap", "slerp"] = "gaussian",
    truncation: float = 1.0,
    condition: Strengths = (),
    directions: DirectionsPath | None = None,
    seed: int = 0,
    format: FormatName = "diffusers",
    render: RenderModel = None,
    drawing: Drawing = Drawing(),
    overwrite: Overwrite = False,
    json: Flag = False,
) -> int:
    """Draw new adapters from a space, and tell the member that each is nearest to.

    Shortest form: w2w-space sample SPACE FOLDER

    With --render MODEL, FOLDER/samples.png shows what each draws above what its nearest member draws.

    Exit code 1 means that a sample is nearly a copy of a member.

    Args:
        out: Folder for the adapters, sample-000.safetensors and so on.
        num: Number of adapters to draw.
        method: Use gaussian for independent normals (paper), mixture, bootstrap of members, or slerp between two.
        truncation: Factor of the distance from the mean; below 1 samples are more usual and less diverse.
        condition: Places of attributes in standard deviations, such as age=1.5; needs --directions.
        directions: Run folder of directions, for conditions.
        seed: Seed of the draws.
        format: Use diffusers for load_lora_weights, kohya for web UIs, peft for PeftModel.from_pretrained.
        json: Print the result as one JSON object.
    """
    from w2w_space.app.inputs import strengths_of
    from w2w_space.files.directions import load_directions
    from w2w_space.files.export import export_point
    from w2w_space.files.space import base_of_space, load_any_space
    from w2w_space.sample import sample as draw

    if num < 1:
        raise UserError(f"`num` is {num}; give at least 1")
    loaded = load_any_space(space)
    known = None if directions is None else load_directions(directions, loaded)
    wanted = strengths_of(condition)
    ending = "" if format == "peft" else ".safetensors"
    paths = [out / f"sample-{number:03d}{ending}" for number in range(num)]
    if not overwrite and (taken := [path for path in paths if path.exists()]):
        raise UserError(f"{printable(taken[0], 300)} is there already; give another folder, or allow to `overwrite` it")
    artist = None if render is None else _artist(render, drawing)
    drawn = draw(loaded, num, method=method, truncation=truncation, condition=wanted, directions=known, seed=seed)
    base, rows = base_of_space(space), []
    for path, one in zip(paths, drawn, strict=True):
        written = export_point(one.point, path, format=format, base=base, overwrite=overwrite)
        rows.append(
            {
                "adapter": written.path.name,
                "distance_from_mean": round(one.point.length, 2),
                "percentile": round(one.typical, 1),
                "nearest": one.nearest or None,
                "distance": round(one.distance, 2),
                "near_copy": one.near_copy if loaded.names else None,
            }
        )
    copies = [row["adapter"] for row in rows if row["near_copy"]]
    written = {"written": out}
    if artist is not None:
        pairs: list[tuple[str, Point]] = []
        for row, one in zip(rows, drawn, strict=True):
            name = Path(row["adapter"]).stem
            if one.nearest:
                pairs.append((f"{name}, {row['distance']} sd from", one.point))
                pairs.append((one.nearest, loaded.member(one.nearest)))
            else:
                pairs.append((name, one.point))
        written["pictures"] = artist(out / "samples.png", [label for label, _ in pairs], [point for _, point in pairs])
    if json:
        emit({**written, "samples": rows, "near_copies": copies if loaded.names else None}, json)
    elif loaded.names:
        shown = {row["adapter"]: f"{row['distance']} sd from {row['nearest']}" for row in rows}
        emit({**shown, "near_copies": copies, **written})
    else:
        shown = {row["adapter"]: f"{row['distance_from_mean']} sd from the mean" for row in rows}
        emit({**shown, "near_copies": "not told: the space was written without its members", **written})
    return 1 if copies else 0


def edit(
    space: SpacePath,
    subject: Subject,
    strengths: Strengths,
    *,
    directions: DirectionsPath,
    out: Path,
    keep: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = (),
    unit: Literal["std", "max", "raw"] = "std",
    metric: Literal["whitened", "euclidean"] = "whitened",
    orthogonal: Flag = False,
    max_std: float | None = None,
    unshrink: Flag = False,
    format: FormatName = "diffusers",
    model: BaseModel = None,
    render: RenderModel = None,
    drawing: Drawing = Drawing(),
    overwrite: Overwrite = False,
    json: Flag = False,
) -> int:
    """Move a subject along directions, and write the result as a LoRA.

    Shortest form: w2w-space edit SPACE SUBJECT age=+1.5 --directions RUN --out OUT.safetensors

    With --render MODEL, OUT.png shows what the subject draws before and after.

    Exit code 1 means that the result is farther out on an axis than --max-std.

    Args:
        directions: Run folder of directions, or its directions.safetensors.
        out: File to write, ending in .safetensors; for peft a folder.
        keep: Attributes whose scores stay as they are.
        unit: Strengths in standard deviations of the members, in largest members (paper), or in the estimator's vector.
        metric: Take kept attributes out by their scores, or by their directions as the paper does.
        orthogonal: Make several directions orthogonal to one another first.
        max_std: Largest place on an axis that is moved along, in standard deviations.
        unshrink: Lengthen the coordinates of an adapter that was not in the fit.
        format: Use diffusers for load_lora_weights, kohya for web UIs, peft for PeftModel.from_pretrained.
        json: Print the result as one JSON object.
    """
    from w2w_space.app.inputs import ranked, strengths_of
    from w2w_space.app.inputs import subject as subject_of
    from w2w_space.edit import edit as move
    from w2w_space.files.directions import load_directions
    from w2w_space.files.export import export_point
    from w2w_space.files.space import base_of_space, load_any_space

    wanted = strengths_of(strengths)
    if not wanted:
        raise UserError("there is nothing to move; give `strengths` such as age=+1.5")
    loaded = load_any_space(space)
    known = load_directions(directions, loaded)
    start = subject_of(subject, loaded, space, model=model, unshrink=unshrink)
    artist = None if render is None else _artist(render, drawing)
    done = move(start, wanted, known, keep=keep, unit=unit, metric=metric, orthogonal=orthogonal)
    written = export_point(done.point, out, format=format, base=base_of_space(space), overwrite=overwrite)
    places = {
        place.name: f"{place.before:+.2f} -> {place.after:+.2f} sd{ranked(place.percentile)}" for place in done.places
    }
    warned = done.warnings if json else "; ".join(done.warnings) or None
    told = {"written": written.path, "places": places, "distance_from_mean": done.length, "warnings": warned}
    if artist is not None:
        sheet = out.parent / f"{out.name.removesuffix('.safetensors')}.png"
        told["pictures"] = artist(sheet, ["before", "after"], [start, done.point])
    emit(told, json)
    far = [p.name for p in done.places if p.name in wanted and max_std is not None and abs(p.after) > max_std]
    return 1 if far else 0


def _artist(name: str, drawing: Drawing) -> "Callable[[Path, list[str], list[Point]], Path]":
    """Returns what draws points in rows on a sheet; the model is read at once, before anything is written."""
    from w2w_space.app.drawing import drawing_model, save_sheet
    from w2w_space.render import render

    model, options = drawing_model(name, drawing)

    def draw(path: Path, labels: "list[str]", points: "list[Point]") -> Path:
        return save_sheet(path, render(model, points, **options), labels)

    return draw
