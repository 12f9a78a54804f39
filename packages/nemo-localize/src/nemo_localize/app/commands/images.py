"""The commands that draw, and measure what is drawn: generate, evaluate."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffcore.cli import Flag, show
from diffcore.errors import UserError
from nemo_localize.app.inputs import digest_of, load_judges, load_originals, read_captions, read_kinds
from nemo_localize.app.options import (
    DrawCompat,
    Judging,
    Methods,
    ModelName,
    MostFrequent,
    Repeat,
    ScalingFactor,
    Strict,
)
from nemo_localize.app.work import Work, conclude
from nemo_localize.settings import DrawSettings, Method, require_scaling

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_localize.neurons import NeuronSet


def generate(
    model: ModelName,
    captions: Path,
    *,
    neurons: Path | None = None,
    per_caption: Flag = False,
    most_frequent: MostFrequent = None,
    scaling_factor: ScalingFactor = 0.0,
    methods: Methods = ("none", "neurons"),
    compat: DrawCompat = "none",
    drawing: DrawSettings = DrawSettings(),
    repeat: Repeat = 0,
    strict: Strict = False,
    work: Work = Work(),
) -> int:
    """Draw captions with and without the found neurons, and under other remedies, from the same noise.

    Shortest form: nemo-localize generate MODEL CAPTIONS --neurons RUN

    Args:
        captions: What to draw.
        neurons: As in apply.
        per_caption: Switch off for each caption its own neurons, instead of all together; on with --compat reference,
            but for --most-frequent.
        methods: Ways side by side; none is the model as it is.
    """
    from nemo_localize.app.report import save_gallery
    from nemo_localize.files.neurons import most_frequent as find_most_frequent
    from nemo_localize.files.neurons import read_neurons
    from nemo_localize.generate import generate as draw

    ways = tuple(dict.fromkeys(methods))
    if neurons is None and {"neurons", "random-neurons"} & set(ways):
        raise UserError("--methods asks for neurons, but there are none; give them with --neurons RUN")
    if per_caption and most_frequent is not None:
        raise UserError("--per-caption and --most-frequent are two choices of neurons; leave one out")
    if neurons is None and most_frequent is not None:
        raise UserError("--most-frequent chooses among neurons; give them with --neurons RUN")
    require_scaling(scaling_factor)
    published = compat == "reference"
    apart, pictured = per_caption or (published and most_frequent is None), _published(drawing, published)
    found = read_captions(captions, strict)
    loaded = work.load(model)
    chosen, separate = _none() if neurons is None else read_neurons(neurons, backbone=loaded.backbone, failed=published)
    if per_caption and not separate:
        raise UserError("--per-caption needs neurons that are told by caption; give a run of localize, or a table")
    if most_frequent is not None:
        chosen = find_most_frequent(separate, most_frequent)
    known = digest_of(chosen, separate)
    if work.output.dry_run:
        images = len(found.distinct) * len(ways) * drawing.num_images
        return work.plan(images=images, steps_each=drawing.image_steps, writes=work.folder("generate", loaded))
    options = {"model": model, "neurons": neurons, "per_caption": per_caption, "most_frequent": most_frequent}
    options |= {"scaling_factor": scaling_factor, "methods": list(ways), "compat": compat}
    options |= {"drawing": drawing, "repeat": repeat}
    with work.open("generate", loaded, [found], options, neurons=known) as run:
        if not run.finished:
            pictures = draw(
                loaded,
                found.distinct,
                ways,
                pictured.seeds,
                work.drawing(pictured, reference=published),
                run,
                neurons=separate if apart and separate else chosen,
                scale=scaling_factor,
                repeat=repeat,
            )
            save_gallery(run, found.distinct, pictures, pictured.seeds)
            conclude(run, {"captions": len(found.distinct), "images": drawing.num_images, "methods": list(ways)})
        show(run, work.output)
    return 0


def evaluate(
    model: ModelName,
    captions: Path,
    *,
    neurons: Path,
    most_frequent: MostFrequent = None,
    scaling_factor: ScalingFactor = 0.0,
    methods: Methods = ("none", "neurons", "random-neurons"),
    ordinary: Path | None = None,
    inception: Path | None = None,
    compat: DrawCompat = "none",
    judging: Judging = Judging(),
    drawing: DrawSettings = DrawSettings(),
    repeat: Repeat = 0,
    strict: Strict = False,
    work: Work = Work(),
) -> int:
    """Measure what switching neurons off does to pictures of memorised and of ordinary captions, against other ways.

    Shortest form: nemo-localize evaluate MODEL CAPTIONS --neurons RUN

    As in the paper's table each caption has its own neurons off; beside it stands the union of all captions' neurons,
    which is what an edited model has off, and what ordinary captions are drawn with. A column type of the captions (VM
    or TM) says which are verbatim and which template memories. With --compat reference images are measured as JPEG, and
    medians are the published code's. Without --sscd and --clip the stated substitutes are taken, and named in the
    tables.

    Args:
        captions: Memorised captions.
        neurons: As in apply.
        methods: Ways side by side.
        ordinary: Captions that must not suffer, at least ten; drawn once each.
        inception: Weights of Inception (TorchScript), for FID and KID of those; else a random network stands in.
    """
    from nemo_localize.app.report import save_evaluation, save_gallery, save_table
    from nemo_localize.evaluate import evaluate as measure
    from nemo_localize.files.neurons import most_frequent as find_most_frequent
    from nemo_localize.files.neurons import read_neurons
    from nemo_localize.generate import generate as draw
    from nemo_localize.images import as_saved, shows_latents

    ways: tuple[Method, ...] = tuple(dict.fromkeys(("none", *methods)))
    distances = _distances(ordinary, inception)
    require_scaling(scaling_factor)
    published = compat == "reference"
    pictured = _published(drawing, published)
    found = read_captions(captions, strict)
    kinds = read_kinds(found)
    others = None if ordinary is None else read_captions(ordinary, strict)
    loaded = work.load(model)
    chosen, separate = read_neurons(neurons, backbone=loaded.backbone, failed=published)
    together = "union"
    if most_frequent is not None:
        chosen, together = find_most_frequent(separate, most_frequent), f"{most_frequent} most frequent"
    known = digest_of(chosen, separate)
    if others is not None and shows_latents(loaded):
        raise UserError(f"{loaded.name} has no autoencoder, and distances are between images; leave out --ordinary")
    judges, originals = load_judges(judging, work, distances=distances), load_originals(judging, found)
    # What all captions have off stands beside what each has, where the file tells them apart.
    beside = bool(separate) and "neurons" in ways
    if work.output.dry_run:
        per_caption = (len(ways) + beside) * drawing.num_images
        images = len(found.distinct) * per_caption + len(ways) * len(others.distinct if others else ())
        return work.plan(images=images, steps_each=drawing.image_steps, writes=work.folder("evaluate", loaded))
    options = {"model": model, "neurons": neurons, "most_frequent": most_frequent, "scaling_factor": scaling_factor}
    options |= {"methods": list(ways), "ordinary": ordinary, "judging": judging, "inception": inception}
    options |= {"compat": compat, "drawing": drawing, "repeat": repeat}
    sets = [found] if others is None else [found, others]
    with work.open("evaluate", loaded, sets, options, neurons=known) as run:
        if not run.finished:
            how = work.drawing(pictured, reference=published)

            def drawn(
                texts: Sequence[str], seeds: range, off: "NeuronSet | Mapping[str, NeuronSet]", *only: Method
            ) -> "dict[str, Tensor]":
                found = draw(
                    loaded, texts, only or ways, seeds, how, run, neurons=off, scale=scaling_factor, repeat=repeat
                )
                if not published or shows_latents(loaded):
                    return found
                return {way: as_saved(images.flatten(0, 1)).view_as(images) for way, images in found.items()}

            pictures = drawn(found.distinct, pictured.seeds, separate or chosen)
            if beside:
                pictures[together] = drawn(found.distinct, pictured.seeds, chosen, "neurons")["neurons"]
            # Ordinary captions have no neurons of their own: they are drawn with what all captions have off.
            once = {} if others is None else drawn(others.distinct, pictured.seeds[:1], chosen)
            result = measure(
                found.distinct,
                pictures,
                originals=originals,
                judges=judges,
                ordinary={together if beside and w == "neurons" else w: shown[:, 0] for w, shown in once.items()},
                of_latents=shows_latents(loaded),
                kinds=kinds,
                reference=published,
            )
            result = replace(result, notes=(*result.notes, *(_left_alone(found.distinct, separate) if beside else ())))
            save_gallery(run, found.distinct, pictures, pictured.seeds, originals)
            save_evaluation(run, result)
            if result.quality:
                save_table(run, "quality", result.quality_rows(), "Pictures of ordinary captions.")
            conclude(run, result.to_json())
        show(run, work.output)
    return 0


def _left_alone(prompts: "Sequence[str]", separate: "Mapping[str, NeuronSet]") -> list[str]:
    """Returns what is to be said of captions that have no neurons of their own where others have."""
    count = sum(not separate.get(prompt) for prompt in prompts)
    return [f"{count} captions have no neurons of their own: under 'neurons' nothing is off for them"] if count else []


def _published(drawing: DrawSettings, published: bool) -> DrawSettings:
    """Returns how pictures are drawn, by the published code's seed where that is reproduced."""
    return drawing.published() if published else drawing


def _none() -> "tuple[NeuronSet, dict[str, NeuronSet]]":
    from nemo_localize.neurons import NO_NEURONS

    return NO_NEURONS, {}


def _distances(ordinary: Path | None, inception: Path | None) -> tuple[str, ...]:
    """Returns the networks in which pictures of ordinary captions are compared."""
    if ordinary is None:
        if inception is not None:
            raise UserError("--inception compares pictures of ordinary captions; give those with --ordinary")
        return ()
    return ("random:0" if inception is None else f"inception:{inception}",)
