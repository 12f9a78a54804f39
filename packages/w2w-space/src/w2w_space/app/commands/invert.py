"""The command that finds adapters from pictures: invert."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from diffcore.cli import Flag
from diffcore.errors import UserError
from w2w_space.app.options import FormatName, SpacePath
from w2w_space.app.options_training import DrawingOptions, ModelName, SearchOptions, Work

if TYPE_CHECKING:
    from diffcore.run import Run, RunMap

_Files = Annotated[tuple[Path, ...], Parameter(consume_multiple=True, negative="")]


def invert(
    space: SpacePath,
    model: ModelName,
    pictures: Annotated[tuple[Path, ...], Parameter(negative="", help="Picture files, and folders of pictures.")],
    *,
    prompt: str | None = None,
    class_label: Annotated[tuple[int, ...], Parameter(consume_multiple=True, negative="")] = (),
    each: Flag = False,
    name: str | None = None,
    mask: _Files = (),
    size: int | None = None,
    directions: Path | None = None,
    baseline: Flag = False,
    refine: float | None = None,
    group_size: int = 16,
    format: FormatName = "diffusers",
    search: SearchOptions = SearchOptions(),
    drawing: DrawingOptions = DrawingOptions(),
    work: Work = Work(),
) -> int:
    """Find the point of a space whose adapter draws the subject of a picture, and write it as a LoRA.

    Shortest form: w2w-space invert SPACE MODEL PICTURES --prompt "a photo of a sks person"

    Several pictures are of one subject, and share one point; with --each every picture is a subject of its own, and all
    are searched for together. The run folder holds adapters/NAME.safetensors, and points/NAME.safetensors, which edit
    and export take. The same command again goes on where it stopped.

    Args:
        prompt: Prompt of the population's members, for models that take prompts.
        class_label: Class of the pictures, one for all or one for each, for models that draw classes.
        each: Take every picture for a subject of its own.
        name: Name of the subject; by default that of the first picture's file.
        mask: Mask file for each picture, bright where places count; of masks with an alpha channel, that channel.
        size: Side in pixels that pictures are cropped and resized to; by default what the model was trained for.
        directions: Run folder of directions, by whose attributes the subject is described.
        baseline: Train a free adapter on the same pictures and budget, too, which nothing holds near the members.
        refine: Let adapters leave the space by this many standard deviations (root mean square), such as 0.1.
        group_size: Number of searches in one forward pass; it bounds the memory.
        format: Use diffusers for load_lora_weights, kohya for web UIs, peft for PeftModel.from_pretrained.
    """
    from w2w_space.app.inverting import Found, Given, components_of, digest_of_directions, foreign
    from w2w_space.app.keeping import ItemMap
    from w2w_space.app.report import write_page
    from w2w_space.app.report_training import SHOWN
    from w2w_space.bank import changed_modules
    from w2w_space.files.directions import load_directions
    from w2w_space.files.space import base_of_space, details_of_space, load_space

    if group_size < 1:
        raise UserError("`group_size` must be at least 1")
    if refine is not None and not refine > 0:
        raise UserError(f"`refine` is {refine}; give how far adapters may leave the space, such as 0.1")
    settings = search.settings(work.runtime.seed)
    within = load_space(space)
    m = components_of(within, settings)
    known = None if directions is None else load_directions(directions, within)
    given = Given.of(pictures, mask, each=each, name=name, class_label=class_label)
    loaded = work.load(model)
    changed_modules(loaded.backbone, within.layout)  # refuses a space of another model
    notes = foreign(details_of_space(space), loaded)
    shown = given.framed(loaded, prompt, size)

    def compute(run: "Run", map: "RunMap") -> dict[str, Any]:
        subjects = [one.encoded(loaded, prompt, size) for one in shown]
        found = Found.search(
            within,
            loaded,
            subjects,
            settings,
            ItemMap(map),
            group_size=group_size,
            baseline=baseline,
            radius=refine,
            directions=known,
        )
        if not map.leading:
            return {}
        found.write(run.folder, format, base_of_space(space))
        return found.keep(run, drawing.of(prompt, subjects[:SHOWN], size), [*notes, *found.outside()], given.skipped)

    options = {
        **{"space": space, "model": model, "pictures": list(pictures), "prompt": prompt},
        **{"class_label": list(class_label), "each": each, "name": name, "mask": list(mask), "size": size},
        **{"directions": directions, "baseline": baseline, "refine": refine, "group_size": group_size},
        **{"format": format, "search": search, "drawing": drawing},
    }
    inputs = {"space": within.fingerprint, **given.digests}
    inputs |= {} if known is None else {"directions": digest_of_directions(known)}
    searches, rows = len(shown) * settings.restarts, settings.steps * settings.batch_size
    plan = {
        "subjects": len(shown),
        "pictures": sum(len(one.shown) for one in shown),
        "left_out": len(given.skipped),
        "components": m,
        "steps": settings.steps,
        "rows_per_forward_pass": min(searches, group_size) * settings.batch_size,
        "rows_with_gradient": rows * (searches + len(shown) * (int(baseline) + int(refine is not None))),
    }
    job = work.job("invert", loaded, options, inputs, volatile=("group_size",))
    return job(compute, plan=plan, report=write_page, shown=_shown)


def _shown(result: Mapping[str, Any]) -> dict[str, Any]:
    told = {
        name: f"{row['removed']:.1%} of the loss removed, {row['distance_from_mean']:.1f} sd from the mean"
        + (f", {row['description']}" if "description" in row else "")
        for name, row in result["subjects"].items()
    }
    return {"answer": result["answer"], **told, "notes": result["notes"], "adapters": result["adapters"]}
