"""The report of a run, made from what its folder holds; it can be made again at any time."""

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from matplotlib.figure import Figure

from diffcore.errors import CorruptArtifactError, printable
from diffcore.io import artifact
from diffcore.report import Report, Series, bar_with_interval, histogram, image_grid, lines_with_band
from diffcore.run import Run
from immiscible_noise.study.compare import Comparison
from immiscible_noise.study.train import read_recipe
from immiscible_noise.study.tuned_recipe import FineTuneRecipe

_NAMES = {
    "vanilla": "vanilla",
    "assignment": "assignment",
    "half": "assignment, strength 0.5",
    "ignore": "assignment, labels ignored",
    "knn": "nearest of 4",
    "knn-inner": "nearest of 4, inner product",
    "early": "assignment, first half of the training",
    "flip": "assignment, negated",
}
_COLUMNS = {
    "main_direction_variance": "variance PC1",
    "batch_size": "batch",
    "leak_error": "± leak",
    "frechet": "Fréchet distance",
    "fewer_steps_at_first": "times fewer, at first",
    "fewer_steps_for_good": "times fewer, for good",
}
_TITLES = {
    "demo": "Immiscible noise on handwritten digits",
    "compare": "Couplings compared",
    "evaluate": "A trained model, measured",
    "diagnose": "What assigning noise would do to these images",
    "train": "A training run",
    "plan": "A plan of noise",
}
_GRID_COLUMNS = 12
_CONDITIONS = {"assignment": "Labels respected", "ignore": "Labels ignored", "vanilla": "No assignment"}
_MAY = (
    "Where the curves of one number of solver steps separate by more than their bands, the couplings differ on these "
    "data, with this network and objective.",
    "The gain belongs to deterministic sampling in few steps. At many steps full assignment is often equal or worse; "
    "strength 0.5 kept most of the gain and lost nothing in our measurements on small images.",
)
_DETERMINISTIC = (
    "Nothing here speaks for stochastic samplers (ancestral, SDE, eta above 0): a model trained on assigned noise is "
    "no score there, and they can ruin its samples."
)
_STOCHASTIC = (
    "The samples were drawn with fresh noise in each step (eta {eta:g}), which is right for vanilla noise only: a "
    "model trained on other noise is no score. Nothing here speaks for deterministic sampling."
)
_MAY_NOT = (
    "A lower training loss is no evidence: assigned noise is easier to predict by construction.",
    "The distances are in the features named above, of these very images; they are not comparable with published FIDs.",
    "Small images exaggerate every effect, good and bad: the tilt of the noise weighs in as one over the square root "
    "of the number of pixels.",
    "With a condition, ignoring labels lets the noise carry the class in training and not in sampling.",
)


def write_page(run: Run) -> Path:
    """Writes `report.html` and its figures from the parts of a run, whichever there are."""
    verb = str(run.record["command"]).split()[-1]
    report = Report(_TITLES.get(verb, "Immiscible noise"), run)
    demo = verb == "demo"
    free, conditional = (run.folder / "unconditional", run.folder / "conditional") if demo else (run.folder, run.folder)
    compared = _has(free, "comparison") and _has(conditional, "comparison")
    if compared:
        _add_comparison(report, run, free)
    if compared and demo:
        study = Comparison.load(conditional)
        report.section("With labels as the condition").text(_condition_sentence(study))
        _add_samples(report, study, conditional)
    if run.has("diagnosis"):
        _add_diagnosis(report, run, answers=not compared)
    if run.has("recipe"):
        _add_training(report, run)
    if verb == "plan":
        _add_plan(report, run)
    if compared:
        if verb != "evaluate":
            report.section("What may be concluded").points(*_MAY)
        eta = float(run.record["config"].get("eta", 0))
        sampler = _STOCHASTIC.format(eta=eta) if eta > 0 else _DETERMINISTIC
        report.section("What may not be concluded").points(*_MAY_NOT, sampler)
    return report.save()


def _curves(study: Comparison) -> Figure:
    """Plots the distance over the training images seen: a colour per coupling, a dash per number of solver steps."""
    series = []
    for (place, coupling), (dash, steps) in product(enumerate(study.couplings()), enumerate(study.sampling_steps())):
        frechet = {
            (s.seed, s.samples_seen): s.frechet
            for s in study.scores
            if s.coupling == coupling and s.sampling_steps == steps
        }
        seeds, seen = (sorted(set(values)) for values in zip(*frechet, strict=True))
        values = [[frechet[seed, n] for n in seen] for seed in seeds]
        # One legend entry per colour and one per dash; a leading underscore keeps the rest out.
        named = _NAMES.get(coupling, coupling) if dash == 0 else counted(steps) if place == 0 else "_"
        label = f"{named}, {counted(steps)}" if place == dash == 0 else named
        series.append(Series.over_seeds(label, seen, values, color=place, dash=dash))
    return lines_with_band(series, x_label="training images seen", y_label="Fréchet distance", log_x=True, log_y=True)


def _final_bars(study: Comparison) -> Figure:
    """Plots the distances after the last training step, with the range over the seeds."""
    bars = [
        (f"{counted(steps)}, {_NAMES.get(name, name)}", [s.frechet for s in study.final(name, steps)], place)
        for steps in study.sampling_steps()
        for place, name in enumerate(study.couplings())
    ]
    labels, distances, colors = zip(*bars, strict=True)
    return bar_with_interval(
        labels,
        *([statistic(values) for values in distances] for statistic in (mean, min, max)),
        x_label="Fréchet distance, lower is better",
        reference=study.floor,
        reference_label="real against real",
        colors=colors,
    )


def _add_comparison(report: Report, run: Run, folder: Path) -> None:
    study = Comparison.load(folder)
    seeds = len({s.seed for s in study.scores})
    report.answer(verdict(study))
    report.section("Fréchet distance")
    band = f"mean of {seeds} seeds, band from least to greatest" if seeds > 1 else "one seed"
    report.plot(
        "curves",
        _curves(study),
        f"Distance to the real images over the training images seen; {band}. Colours are couplings, dashes numbers of "
        f"solver steps. Features: {study.features}.",
    )
    report.plot(
        "final",
        _final_bars(study),
        f"After the last training step; {band.replace('band', 'whiskers')}. Real against real at {study.floor_size} "
        f"images a side: {study.floor:.2f}.",
    )
    report.table([_readable(row) for row in study.summary_rows()], "After the last training step")
    if rows := study.speedup_rows():
        report.table(
            [_readable(row) for row in rows],
            "How many times fewer training steps than vanilla to the distance that vanilla ends at, when it is first "
            "reached and from when on it stays: geometric mean over the seeds, with the least and the most",
        )
    if _has(folder, "grids"):
        report.section("Samples")
        _add_samples(report, study, folder)


def _add_samples(report: Report, study: Comparison, folder: Path) -> None:
    grids = artifact.load(folder / "parts" / "grids")
    rows = study.couplings()
    images = torch.cat([grids.tensors[row][:_GRID_COLUMNS] for row in rows])
    report.images(
        images,
        f"{counted(grids.fields['sampling_steps'], 'solver step')}; each column starts from the same noise with every "
        f"coupling, seed {min(s.seed for s in study.scores)}.",
        columns=_GRID_COLUMNS,
        row_labels=[_NAMES.get(row, row) for row in rows],
    )


def _add_diagnosis(report: Report, run: Run, *, answers: bool) -> None:
    diagnosis, gallery = run.load("diagnosis").fields, run.load("gallery")
    if "coupling" not in diagnosis:
        raise CorruptArtifactError(
            f"{printable(run.folder, 300)} was written by an earlier version of immiscible-noise; "
            "give its command again with another --out"
        )
    if answers:
        name, labelled = diagnosis["coupling"], any(row["coupling"] == "blocks" for row in diagnosis["rows"])
        within = ", within labels" if labelled and name != "vanilla" else ""
        report.answer(f"Recommended: {_NAMES.get(name, name)}{within}: {diagnosis['why']}.")
    report.section("What the assignment does to the noise")
    images = gallery.tensors
    if "images" in images:
        _add_averages(report, gallery)
    distances = {name: images[f"distances/{name}"] for name in gallery.fields["couplings"]}
    pairs = len(next(iter(distances.values())))
    figure = histogram(distances, x_label="L2 distance between image and noise")
    report.plot("distances", figure, f"Distances between image and noise, {pairs:,} pairs each.")
    # Error and chance of the leak stand in the sentence below; the table would not fit on a page with them.
    rows = [{k: v for k, v in row.items() if k not in ("leak_error", "chance")} for row in diagnosis["rows"]]
    report.table([_readable(row) for row in rows], "By coupling and batch size")
    report.text(_leak_sentence(diagnosis["rows"]))


def _add_averages(report: Report, gallery: artifact.Artifact) -> None:
    images, fields = gallery.tensors, gallery.fields
    averages = torch.cat([images["independent"], images["assigned"]])
    # Around grey, on one scale for both rows.
    contrast = 4 * images["assigned"].std().clamp(min=1e-6)
    shown = torch.cat([images["images"], 0.5 + averages / contrast])
    shown_as = fields.get("shown_as", "images")
    first = "image" if shown_as == "images" else shown_as
    grid = image_grid(shown, columns=len(images["images"]), row_labels=[first, "independent noise", "assigned noise"])
    whole = "" if shown_as == "images" else " Of noise the mean over the channels is shown, at the size of the latents."
    report.plot(
        "tilt",
        grid,
        f"{first.capitalize()}s, and the average of {fields['rounds']} noises that each met in batches of "
        f"{fields['batch_size']}. Independent noise averages to nothing; assigned noise averages to a trace of its "
        f"image: that is the tilt.{whole}",
    )


def _add_training(report: Report, run: Run) -> None:
    recipe = read_recipe(run.folder)
    steps, batch_size = recipe.settings.steps, recipe.settings.batch_size
    started = f"{printable(recipe.model)}, fine-tuned: " if isinstance(recipe, FineTuneRecipe) else ""
    report.answer(f"{started}{steps:,} steps of {batch_size} images, noise: {recipe.coupling.method}.")
    report.section("Training")
    if isinstance(recipe, FineTuneRecipe):
        report.text(_tuning_sentence(recipe))
    rows = [json.loads(line) for line in (run.folder / "log.jsonl").read_text("utf-8").splitlines()]
    rows = [row for row in rows if row.get("loss") is not None]
    if rows:
        loss = Series("loss", [row["step"] for row in rows], [row["loss"] for row in rows])
        figure = lines_with_band([loss], x_label="step", y_label="loss", log_y=True)
        report.plot(
            "loss",
            figure,
            "Training loss of single batches. Losses of different couplings cannot be compared: assigned noise is "
            "easier to predict by construction.",
        )
    samples = run.folder / "figures" / "samples.png"
    if samples.exists():
        report.figure(samples, f"Samples of the averaged weights after {steps:,} steps.")


def _tuning_sentence(recipe: FineTuneRecipe) -> str:
    """Returns what learnt, and what the noise was told of the captions."""
    rank = recipe.settings.lora_rank
    learnt = f"A LoRA of rank {rank} on {', '.join(recipe.settings.lora_targets)}" if rank else "The whole network"
    told = {
        "nothing": "The model is told nothing of its images.",
        "block": "Noise was exchanged between images of equal captions or classes only.",
        "soft": "Captions hardly ever are equal: noise was exchanged more readily between images of like captions.",
        "ignore": "Captions were ignored when noise was exchanged.",
    }[recipe.told]
    heeded = recipe.coupling.method == "assignment"
    return f"{learnt} learnt, at a rate of {recipe.settings.peak:g}." + (f" {told}" if heeded else "")


def _add_plan(report: Report, run: Run) -> None:
    told = run.load("plan").fields
    report.answer(
        f"{told['visits']:,} visits in windows of {told['window']:,}: noise lies {told['distance_reduction']:.2%} "
        "nearer to its sample than independent noise does."
    )
    images = run.load("gallery").tensors
    report.section("Distances")
    figure = histogram(
        {"independent": images["independent"], "planned": images["planned"]}, x_label="L2 distance of sample and noise"
    )
    report.plot("distances", figure, f"Samples and noises of the first {len(images['planned']):,} visits.")
    report.section("Take it into a trainer").text(
        f"plan = read_plan('{told['file']}'); the loader's sampler is plan.order; in the step, noise = "
        "plan.noise(visits, like=x), where visits are the numbers of samples that the training took before."
    )


def counted(number: int, noun: str = "step") -> str:
    """Returns a number of things in words, such as "1 step" and "5 steps"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def verdict(study: Comparison) -> str:
    """Returns the answer in a sentence."""
    steps = study.sampling_steps()[0]
    means = {name: mean(s.frechet for s in study.final(name, steps)) for name in study.couplings()}
    vanilla, told = means.pop("vanilla", None), counted(steps, "solver step")
    if vanilla is None or not means:
        name = study.couplings()[0]
        return f"{_NAMES.get(name, name)}: Fréchet distance {vanilla or means[name]:.3g} at {told}."
    parts = [f"{_NAMES.get(name, name)} {value:.3g} ({_ratio(study, name, steps)})" for name, value in means.items()]
    return f"Fréchet distance at {told}: vanilla {vanilla:.3g}, {', '.join(parts)}."


def _ratio(study: Comparison, coupling: str, steps: int) -> str:
    ratio, deviation = study.ratio(coupling, steps)
    return f"{ratio:.2f}×" if deviation is None else f"{ratio:.2f} ± {deviation:.2f}×"


def _condition_sentence(study: Comparison) -> str:
    told = []
    for name in study.couplings():
        score = study.final(name, study.sampling_steps()[0])[0]
        told.append(f"{_CONDITIONS.get(name, name)}: {score.accuracy or 0:.1%} of the samples show the digit asked for")
    return (
        f"{'; '.join(told)} ({counted(study.sampling_steps()[0], 'solver step')}). Where labels are ignored, the noise "
        "of a batch carries the class in training; in sampling it does not, and the model looks for the class in the "
        "wrong place."
    )


def _leak_sentence(rows: Sequence[dict[str, Any]]) -> str:
    leaks = [row for row in rows if row["leak"] is not None]
    if not leaks:
        return "The images have no labels, so there is no leak to measure."
    largest = max((row["batch_size"] for row in leaks if row["coupling"] == "assignment"), default=0)
    told = []
    for coupling, name in (("assignment", "labels ignored"), ("blocks", "labels respected")):
        row = next((r for r in leaks if r["coupling"] == coupling and r["batch_size"] == largest), None)
        if row is not None:
            told.append(f"{name} {row['leak']:.1%} ± {row['leak_error']:.1%}")
    chance = leaks[0]["chance"]
    return f"Leak: a linear probe reads the class from the noise alone: {', '.join(told)}; chance is {chance:.1%}."


def _has(folder: Path, part: str) -> bool:
    return (folder / "parts" / f"{part}.json").exists()


def _readable(row: dict[str, Any]) -> dict[str, Any]:
    return {
        _COLUMNS.get(name, name.replace("_", " ")): _NAMES.get(value, value) if name == "coupling" else value
        for name, value in row.items()
        if value is not None
    }
