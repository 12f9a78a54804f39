"""The commands that draw, and measure what is drawn: generate, evaluate."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffcore.cli import Flag, show
from diffcore.errors import UserError
from nemo_localize.commands.inputs import digest_of, load_judges, load_originals, read_captions
from nemo_localize.commands.options import Judging, Methods, ModelName, Repeat, Strict
from nemo_localize.commands.work import Work, conclude
from nemo_localize.settings import DrawSettings, Method

if TYPE_CHECKING:
    from torch import Tensor


def generate(
    model: ModelName,
    captions: Path,
    *,
    neurons: Path | None = None,
    per_caption: Flag = False,
    methods: Methods = ("none", "neurons"),
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
        per_caption: Switch off for each caption its own neurons, instead of all together.
        methods: Ways side by side; none is the model as it is.
    """
    from nemo_localize.generate import generate as draw
    from nemo_localize.neuron_files import read_neurons
    from nemo_localize.neurons import NO_NEURONS
    from nemo_localize.page import save_gallery

    ways = tuple(dict.fromkeys(methods))
    if neurons is None and {"neurons", "random-neurons"} & set(ways):
        raise UserError("--methods asks for neurons, but there are none; give them with --neurons RUN")
    found = read_captions(captions, strict)
    together, separate = (NO_NEURONS, {}) if neurons is None else read_neurons(neurons)
    known = digest_of(together, separate)
    loaded = work.load(model)
    if work.output.dry_run:
        images = len(found.distinct) * len(ways) * drawing.num_images
        return work.plan(images=images, steps_each=drawing.image_steps, writes=work.folder("generate", loaded))
    options = {"model": model, "neurons": neurons, "per_caption": per_caption, "methods": list(ways)}
    options |= {"drawing": drawing, "repeat": repeat}
    with work.open("generate", loaded, [found], options, neurons=known) as run:
        if not run.finished:
            chosen = separate if per_caption else together
            how = work.drawing(drawing)
            pictures = draw(loaded, found.distinct, ways, drawing.seeds, how, run, neurons=chosen, repeat=repeat)
            save_gallery(run, found.distinct, pictures, drawing.seeds)
            conclude(run, {"captions": len(found.distinct), "images": drawing.num_images, "methods": list(ways)})
        show(run, work.output)
    return 0


def evaluate(
    model: ModelName,
    captions: Path,
    *,
    neurons: Path,
    methods: Methods = ("none", "neurons", "random-neurons"),
    ordinary: Path | None = None,
    inception: Path | None = None,
    judging: Judging = Judging(),
    drawing: DrawSettings = DrawSettings(),
    repeat: Repeat = 0,
    strict: Strict = False,
    work: Work = Work(),
) -> int:
    """Measure what switching neurons off does to pictures of memorised and of ordinary captions, against other ways.

    Shortest form: nemo-localize evaluate MODEL CAPTIONS --neurons RUN

    Without --sscd and --clip the stated substitutes are taken, and named in the tables.

    Args:
        captions: Memorised captions.
        neurons: As in apply.
        methods: Ways side by side.
        ordinary: Captions that must not suffer, at least ten; drawn once each.
        inception: Weights of Inception (TorchScript), for FID and KID of those; else a random network stands in.
    """
    from nemo_localize.evaluate import evaluate as measure
    from nemo_localize.generate import generate as draw
    from nemo_localize.neuron_files import read_neurons
    from nemo_localize.page import save_evaluation, save_gallery, save_table
    from nemo_localize.pictures import shows_latents

    ways: tuple[Method, ...] = tuple(dict.fromkeys(("none", *methods)))
    distances = _distances(ordinary, inception)
    found, (chosen, separate) = read_captions(captions, strict), read_neurons(neurons)
    known = digest_of(chosen, separate)
    others = None if ordinary is None else read_captions(ordinary, strict)
    loaded = work.load(model)
    if others is not None and shows_latents(loaded):
        raise UserError(f"{loaded.name} has no autoencoder, and distances are between images; leave out --ordinary")
    judges, originals = load_judges(judging, work, distances=distances), load_originals(judging, found)
    if work.output.dry_run:
        images = len(ways) * (len(found.distinct) * drawing.num_images + len(others.distinct if others else ()))
        return work.plan(images=images, steps_each=drawing.image_steps, writes=work.folder("evaluate", loaded))
    options = {"model": model, "neurons": neurons, "methods": list(ways), "ordinary": ordinary, "judging": judging}
    options |= {"inception": inception, "drawing": drawing, "repeat": repeat}
    sets = [found] if others is None else [found, others]
    with work.open("evaluate", loaded, sets, options, neurons=known) as run:
        if not run.finished:
            how = work.drawing(drawing)

            def drawn(texts: Sequence[str], seeds: range) -> "dict[str, Tensor]":
                return draw(loaded, texts, ways, seeds, how, run, neurons=chosen, repeat=repeat)

            pictures = drawn(found.distinct, drawing.seeds)
            once = {} if others is None else drawn(others.distinct, drawing.seeds[:1])
            result = measure(
                found.distinct,
                pictures,
                originals=originals,
                judges=judges,
                ordinary={way: images[:, 0] for way, images in once.items()} or None,
                of_latents=shows_latents(loaded),
            )
            save_gallery(run, found.distinct, pictures, drawing.seeds, originals)
            save_evaluation(run, result)
            if result.quality:
                save_table(run, "quality", result.quality_rows(), "Pictures of ordinary captions.")
            conclude(run, result.to_json())
        show(run, work.output)
    return 0


def _distances(ordinary: Path | None, inception: Path | None) -> tuple[str, ...]:
    """Returns the networks in which pictures of ordinary captions are compared."""
    if ordinary is None:
        if inception is not None:
            raise UserError("--inception compares pictures of ordinary captions; give those with --ordinary")
        return ()
    return ("random:0" if inception is None else f"inception:{inception}",)
