"""The command that makes a population: train."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffcore.errors import UserError
from w2w_space.app.options import FormatName, Overwrite
from w2w_space.app.options_training import DrawingOptions, ModelName, PriorOptions, RecipeOptions, Work

if TYPE_CHECKING:
    from diffcore.run import Run, RunMap


def train(
    model: ModelName,
    instances: str,
    *,
    prompt: str | None = None,
    class_label: int | None = None,
    num_members: int | None = None,
    size: int | None = None,
    recipe: RecipeOptions = RecipeOptions(),
    prior: PriorOptions = PriorOptions(),
    group_size: int = 16,
    num_pairs: int = 32,
    export: Path | None = None,
    format: FormatName = "diffusers",
    overwrite: Overwrite = False,
    drawing: DrawingOptions = DrawingOptions(),
    work: Work = Work(),
) -> int:
    """Train a population: one small LoRA for each subject, by one recipe, many at a time in one forward pass.

    Shortest form: w2w-space train MODEL INSTANCES --prompt "a photo of a sks person" --out POPULATION

    INSTANCES is a folder or zip archive with one sub-folder of pictures per subject; a file labels.csv in the folder
    goes with the population. For models that draw classes, pictures lie in sub-folders of their class's number, as in
    INSTANCES/alice/3/1.png; or INSTANCES is zoo:digits-styles. The same command again goes on where it stopped, on any
    number of processes. build takes the run folder. Exit code 1 means that members failed; the others are kept.

    Args:
        instances: Folder or zip archive of subjects, or zoo:digits-styles.
        prompt: Prompt of all subjects, with a rare word that stands for each.
        class_label: Class of all pictures, for models that draw classes.
        num_members: Number of subjects that are taken, the first by name; by default all.
        size: Side in pixels that pictures are cropped and resized to; by default what the model was trained for.
        group_size: Number of members that are trained together; it bounds the memory.
        num_pairs: Number of pairs of timestep and noise on which each member's loss is measured in the end.
        export: Folder that each member is written to, too, as a LoRA file.
        format: Use diffusers for load_lora_weights, kohya for web UIs, peft for PeftModel.from_pretrained.
    """
    from diffcore.run import Run as Opened
    from w2w_space.app.keeping import ItemMap
    from w2w_space.app.report import write_page
    from w2w_space.app.training import Sources, kept, write_adapters, write_labels, write_population
    from w2w_space.files.population import PopulationFolder
    from w2w_space.recipe import layout_for
    from w2w_space.train_population import train_population

    if group_size < 1 or num_pairs < 1:
        raise UserError("`group_size` and `num_pairs` must be at least 1")
    told = recipe.recipe(work.runtime.seed)
    sources = Sources.of(instances, prior, num_members)  # what is wrong with folders is told before the model is read
    if export is not None and not overwrite:
        sources.require_free(export, format)
    loaded = work.load(model)
    layout = layout_for(loaded, told.targets, told.rank)
    sources.require(loaded, prompt, class_label, prior.class_prompt, size)

    def compute(run: "Run", map: "RunMap") -> dict[str, Any]:
        read = sources.read(loaded, prompt, class_label, size, map)
        trained = train_population(
            loaded,
            read.instances,
            told,
            layout=layout,
            prior=sources.read_class(loaded, prior.class_prompt, class_label, size, map),
            prior_weight=prior.prior_weight,
            group_size=group_size,
            num_pairs=num_pairs,
            map=ItemMap(map),
        )
        if not map.leading:
            return {}
        facts = {"recipe": told.to_json(), "prompt": prompt, "model_fingerprint": loaded.fingerprint}
        population = write_population(run.folder, layout, loaded, trained, read.skipped, facts)
        write_labels(run.folder, sources.labels, population.names)
        return kept(run, loaded, layout, read, trained, drawing, prompt, size)

    options = {
        **{"model": model, "instances": instances, "prompt": prompt, "class_label": class_label},
        **{"num_members": num_members, "size": size, "recipe": recipe, "prior": prior, "group_size": group_size},
        **{"num_pairs": num_pairs, "export": export, "format": format, "overwrite": overwrite, "drawing": drawing},
    }
    job = work.job("train", loaded, options, sources.digests, volatile=("group_size", "export", "format", "overwrite"))
    plan = sources.plan(layout, told, group_size=group_size, num_pairs=num_pairs)
    code = job(compute, plan=plan, report=write_page, passed=lambda result: not result["failed"], shown=_shown)
    if export is not None and not work.output.dry_run:
        # A finished run is exported, too, where that is asked for later.
        with Opened.reopen(job.folder) as run:
            if run.leading:
                write_adapters(PopulationFolder.open(run.folder), export, format, overwrite=overwrite)
    return code


def _shown(result: Mapping[str, Any]) -> dict[str, Any]:
    counted = {"left_out": len(result["left_out"]), "notes": len(result["notes"])}
    return {name: counted.get(name, value) for name, value in result.items()}
