"""The commands that generate images, and measure them: generate, evaluate."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffcore.cli import Flag
from diffcore.errors import UserError
from nemo_localize.app.inputs import digest_of_neurons, load_judges, load_originals, read_captions, read_kinds
from nemo_localize.app.options import (
    ImageCompat,
    ImageOptions,
    Judging,
    Mitigations,
    ModelName,
    MostFrequent,
    Repeat,
    ScalingFactor,
    Strict,
)
from nemo_localize.app.work import Work
from nemo_localize.settings import Mitigation, require_scaling

if TYPE_CHECKING:
    from torch import Tensor

    from diffcore.run import Run, RunMap
    from nemo_localize.neurons import NeuronSet


def generate(
    model: ModelName,
    captions: Path,
    *,
    neurons: Path | None = None,
    per_caption: Flag = False,
    most_frequent: MostFrequent = None,
    scaling_factor: ScalingFactor = 0.0,
    mitigations: Mitigations = ("none", "neurons"),
    compat: ImageCompat = "none",
    images: ImageOptions = ImageOptions(),
    repeat: Repeat = 0,
    strict: Strict = False,
    work: Work = Work(),
) -> int:
    """Generate captions with and without the found neurons, and under other mitigations, from the same noise.

    Shortest form: nemo-localize generate MODEL CAPTIONS --neurons RUN

    Args:
        captions: File of captions to generate images for.
        neurons: Run or file with neurons, as in export.
        per_caption: Ablate each caption's own neurons instead of all together; with --compat published this is the
            default, unless --most-frequent is given.
        mitigations: Mitigations side by side; none is the model as it is.
    """
    from nemo_localize.app.report import save_gallery, write_page
    from nemo_localize.files.neurons import most_frequent as find_most_frequent
    from nemo_localize.files.neurons import read_neurons
    from nemo_localize.generate import generate as generate_images

    mitigations = tuple(dict.fromkeys(mitigations))
    if neurons is None and {"neurons", "random-neurons"} & set(mitigations):
        raise UserError("`mitigations` asks for neurons, but there are none; give them with `neurons` RUN")
    if per_caption and most_frequent is not None:
        raise UserError("`per_caption` and `most_frequent` are two choices of neurons; leave one out")
    if neurons is None and most_frequent is not None:
        raise UserError("`most_frequent` chooses among neurons; give them with `neurons` RUN")
    require_scaling(scaling_factor)
    published = compat == "published"
    apart = per_caption or (published and most_frequent is None)
    found = read_captions(captions, strict)
    loaded = work.load(model)
    chosen, separate = _none() if neurons is None else read_neurons(neurons, backbone=loaded.backbone, failed=published)
    if per_caption and not separate:
        raise UserError("`per_caption` needs neurons that are told by caption; give a run of localize, or a table")
    if most_frequent is not None:
        chosen = find_most_frequent(separate, most_frequent)
    seeds = images.seeds(compat)

    def compute(run: "Run", map: "RunMap") -> dict[str, Any]:
        shown = generate_images(
            loaded,
            found.distinct,
            seeds,
            mitigations=mitigations,
            neurons=separate if apart and separate else chosen,
            scale=scaling_factor,
            settings=images.settings(work.computing.batch_size, compat),
            repeat=repeat,
            map=map,
        )
        if run.leading:
            save_gallery(run, found.distinct, shown, seeds)
        return {"captions": len(found.distinct), "images": images.num_images, "mitigations": list(mitigations)}

    options = {"model": model, "neurons": neurons, "per_caption": per_caption, "most_frequent": most_frequent}
    options |= {"scaling_factor": scaling_factor, "mitigations": list(mitigations), "compat": compat}
    options |= {"images": images, "repeat": repeat}
    count = len(found.distinct) * len(mitigations) * images.num_images
    job = work.run_of("generate", loaded, [found], options, neurons=digest_of_neurons(chosen, separate))
    return job(compute, plan={"images": count, "steps_each": images.image_steps}, report=write_page)


def evaluate(
    model: ModelName,
    captions: Path,
    *,
    neurons: Path,
    most_frequent: MostFrequent = None,
    scaling_factor: ScalingFactor = 0.0,
    mitigations: Mitigations = ("none", "neurons", "random-neurons"),
    ordinary: Path | None = None,
    inception: Path | None = None,
    compat: ImageCompat = "none",
    judging: Judging = Judging(),
    images: ImageOptions = ImageOptions(),
    repeat: Repeat = 0,
    strict: Strict = False,
    work: Work = Work(),
) -> int:
    """Measure what ablating neurons does to images of memorised and of ordinary captions, against other mitigations.

    Shortest form: nemo-localize evaluate MODEL CAPTIONS --neurons RUN

    As in the paper's table, each caption has its own neurons ablated; the union of all captions' neurons, which an
    exported model lacks, is measured beside it, and is ablated for ordinary captions. A column type of the captions (VM
    or TM) says which are verbatim and which template memories. With --compat published images are measured as JPEG, and
    medians follow the published code. Without --sscd and --clip substitutes are taken, which the tables name.

    Args:
        captions: File of memorised captions.
        neurons: Run or file with neurons, as in export.
        mitigations: Mitigations side by side; none is always among them.
        ordinary: File of at least ten ordinary captions, generated once each, to measure what ablation costs elsewhere.
        inception: Weights of Inception (TorchScript), for FID and KID of ordinary captions; a random network stands in
            for it.
    """
    from nemo_localize.app.report import save_evaluation, save_gallery, write_page
    from nemo_localize.evaluate import evaluate as measure
    from nemo_localize.files.neurons import most_frequent as find_most_frequent
    from nemo_localize.files.neurons import read_neurons
    from nemo_localize.generate import generate as generate_images
    from nemo_localize.images import as_saved, shows_latents

    mitigations = tuple(dict.fromkeys(("none", *mitigations)))
    distances = _distances(ordinary, inception)
    require_scaling(scaling_factor)
    published, seeds = compat == "published", images.seeds(compat)
    found = read_captions(captions, strict)
    kinds = read_kinds(found)
    others = None if ordinary is None else read_captions(ordinary, strict)
    loaded = work.load(model)
    chosen, separate = read_neurons(neurons, backbone=loaded.backbone, failed=published)
    together = "union"
    if most_frequent is not None:
        chosen, together = find_most_frequent(separate, most_frequent), f"{most_frequent} most frequent"
    if others is not None and shows_latents(loaded):
        raise UserError(f"{loaded.name} has no autoencoder, and distances are between images; leave out `ordinary`")
    judges, originals = load_judges(judging, work, distances=distances), load_originals(judging, found)
    # The union of all neurons is measured beside each caption's own, where the file tells these apart.
    beside = bool(separate) and "neurons" in mitigations

    def compute(run: "Run", map: "RunMap") -> dict[str, Any]:
        def generated(
            texts: Sequence[str], seeds: range, ablated: "NeuronSet | Mapping[str, NeuronSet]", *only: Mitigation
        ) -> "dict[str, Tensor]":
            found = generate_images(
                loaded,
                texts,
                seeds,
                mitigations=only or mitigations,
                neurons=ablated,
                scale=scaling_factor,
                settings=images.settings(work.computing.batch_size, compat),
                repeat=repeat,
                map=map,
            )
            if not published or shows_latents(loaded):
                return found
            return {mitigation: as_saved(shown.flatten(0, 1)).view_as(shown) for mitigation, shown in found.items()}

        shown = generated(found.distinct, seeds, separate or chosen)
        if beside:
            shown[together] = generated(found.distinct, seeds, chosen, "neurons")["neurons"]
        # Ordinary captions have no neurons of their own, so the union is ablated for them.
        once = {} if others is None else generated(others.distinct, seeds[:1], chosen)
        if not run.leading:
            return {}
        result = measure(
            found.distinct,
            shown,
            originals=originals,
            judges=judges,
            ordinary={together if beside and w == "neurons" else w: own[:, 0] for w, own in once.items()},
            of_latents=shows_latents(loaded),
            kinds=kinds,
            published=published,
        )
        result = replace(result, notes=(*result.notes, *(_without_neurons(found.distinct, separate) if beside else ())))
        save_gallery(run, found.distinct, shown, seeds, originals)
        save_evaluation(run, result)
        if result.quality:
            run.keep_table("quality", result.quality_rows(), "Images of ordinary captions.")
        return result.to_json()

    options = {"model": model, "neurons": neurons, "most_frequent": most_frequent, "scaling_factor": scaling_factor}
    options |= {"mitigations": list(mitigations), "ordinary": ordinary, "judging": judging, "inception": inception}
    options |= {"compat": compat, "images": images, "repeat": repeat}
    per_caption = (len(mitigations) + beside) * images.num_images
    count = len(found.distinct) * per_caption + len(mitigations) * len(others.distinct if others else ())
    sets = [found] if others is None else [found, others]
    job = work.run_of("evaluate", loaded, sets, options, neurons=digest_of_neurons(chosen, separate))
    return job(compute, plan={"images": count, "steps_each": images.image_steps}, report=write_page)


def _without_neurons(prompts: "Sequence[str]", separate: "Mapping[str, NeuronSet]") -> list[str]:
    """Returns a note on captions that have no neurons of their own, where others have some."""
    count = sum(not separate.get(prompt) for prompt in prompts)
    return [f"{count} captions have no neurons of their own: under 'neurons' nothing is ablated"] if count else []


def _none() -> "tuple[NeuronSet, dict[str, NeuronSet]]":
    from nemo_localize.neurons import NO_NEURONS

    return NO_NEURONS, {}


def _distances(ordinary: Path | None, inception: Path | None) -> tuple[str, ...]:
    """Returns the networks in which images of ordinary captions are compared."""
    if ordinary is None:
        if inception is not None:
            raise UserError("`inception` compares images of ordinary captions; give those with `ordinary`")
        return ()
    return ("random:0" if inception is None else f"inception:{inception}",)
