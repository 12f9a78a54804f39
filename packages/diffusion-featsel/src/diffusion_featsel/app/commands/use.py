"""The commands that use features: extract, correspond."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from diffcore.cli import Flag, track
from diffcore.errors import UserError
from diffusion_featsel.app.options import Extraction, Features, Images, ModelName
from diffusion_featsel.app.work import Work

if TYPE_CHECKING:
    from diffcore.run import Run, RunMap


def extract(
    model: ModelName,
    images: Images,
    *,
    features: Features,
    project: str | None = None,
    storage: Literal["auto", "float16", "bfloat16", "float32"] = "auto",
    prompts: Path | None = None,
    latents: Path | None = None,
    shard_mb: int = 512,
    extraction: Extraction = Extraction(),
    work: Work = Work(),
) -> int:
    """Write the chosen activations of a folder of images as safetensors, resumable and readable image by image.

    Shortest form: diffusion-featsel extract MODEL IMAGES --features selection.json

    Args:
        project: Store D channels of each activation: pca:D from the first 64 images, or random:D.
        storage: Precision of the features; auto is float16 where nothing overflows, else bfloat16.
        prompts: JSON file with the prompt of each image, by file name.
        latents: Folder that keeps encoded images for later runs: the autoencoder costs more than the network.
        shard_mb: Largest size of one file in MiB.
    """
    from diffusion_featsel.app.inputs import digests, features_named, make_extractor, read_prompts
    from diffusion_featsel.app.report import write_page
    from diffusion_featsel.app.storing import keep_stored
    from diffusion_featsel.files.features import StoredFeatures, plan_features, write_features
    from diffusion_featsel.files.images import ImageList

    if shard_mb < 1:
        raise UserError(f"`shard_mb` is {shard_mb}; give at least 1")
    named = features_named(features)
    loaded, extraction = work.load(model), work.seeded(extraction)
    listed = ImageList.of(images)
    told = read_prompts(prompts)
    extractor = make_extractor(loaded, named, extraction)
    plan = plan_features(
        extractor,
        listed,
        prompts=told,
        project=project,
        storage=storage,
        batch_size=extraction.rows(),
        shard_bytes=shard_mb * 2**20,
    )
    options = {
        **{"model": model, "images": images, "features": list(features), "project": project, "storage": storage},
        **{"prompts": prompts, "latents": latents, "shard_mb": shard_mb, "extraction": extraction},
    }

    def compute(run: "Run", map: "RunMap") -> dict[str, Any]:
        fabric = work.runtime.launched() if work.runtime.devices * work.runtime.num_nodes > 1 else None
        rank, processes = (0, 1) if fabric is None else (fabric.global_rank, fabric.world_size)
        write_features(
            run.folder,
            plan,
            latents=latents,
            rank=rank,
            processes=processes,
            progress=lambda shards, total: track(shards, "shards", total),
        )
        if fabric is not None:
            fabric.barrier()
        if not run.leading:
            return {}
        stored = StoredFeatures.open(run.folder)
        keep_stored(run, stored, listed)
        return {
            "answer": f"{len(stored)} images, {len(stored.names)} activations each.",
            "images": len(stored),
            "activations": list(stored.names),
            "cost": extractor.cost,
            "skipped": [list(entry) for entry in listed.skipped],
            "failed": stored.failed,
        }

    job = work.job("extract", loaded, options, {"features": plan.fingerprint} | digests(features, prompts))
    told_plan = {
        "images": len(listed.images),
        "distinct": len(listed.distinct),
        "skipped": len(listed.skipped),
        "shards": len(plan.shards),
        "share_of_a_pass": extractor.cost,
    }
    return job(compute, plan=told_plan, report=write_page)


def correspond(
    model: ModelName,
    source: Path,
    target: Path,
    *,
    features: Features = (),
    points: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = (),
    matcher: Literal["argmax", "soft", "window"] = "argmax",
    mutual: Flag = False,
    flip: Flag = False,
    extraction: Extraction = Extraction(),
    work: Work = Work(),
) -> int:
    """Find which places of one image belong to which of another, and draw them.

    Shortest form: diffusion-featsel correspond MODEL A.jpg B.jpg --features selection.json

    Without points every cell is matched both ways, and cells that return to themselves are drawn.

    Args:
        source: File of the first image.
        target: File of the second image.
        points: Positions in the first image in its own pixels, as x,y.
        matcher: Largest cosine, or the expected place over the whole image or around the largest.
        mutual: Keep the points alone that are matched back.
        flip: Try the mirrored second image, too.
    """
    from diffusion_featsel.app.corresponding import matched, read_pair
    from diffusion_featsel.app.inputs import digests, features_named, make_extractor
    from diffusion_featsel.app.report import write_page

    loaded, extraction = work.load(model), work.seeded(extraction)
    named = features_named(features) if features else None
    where = [_point(text) for text in points]
    pictures = read_pair(source, target, where)
    extractor = make_extractor(loaded, named or _usual(loaded), extraction)
    options = {
        **{"model": model, "source": source, "target": target, "features": list(features), "points": list(points)},
        **{"matcher": matcher, "mutual": mutual, "flip": flip, "extraction": extraction},
    }

    def compute(run: "Run", map: "RunMap") -> dict[str, Any]:
        names = (source.name, target.name)
        return matched(run, extractor, pictures, names, where, matcher=matcher, mutual=mutual, flip=flip)

    plan = {
        "activations": list(extractor.names),
        "points": len(where) or "all cells",
        "share_of_a_pass": extractor.cost,
    }
    job = work.job("correspond", loaded, options, digests(features, source, target), volatile=("batch_size",))
    return job(compute, plan=plan, report=write_page, shown=lambda r: {k: v for k, v in r.items() if k != "matches"})


def _usual(model: Any) -> list[str]:
    """Returns what is taken where no features are named: the outputs of all upsamplers but the last."""
    from diffusion_featsel.inventory import inventory

    names = [row.name for row in inventory(model).paper if row.kind == "upsampler-out"]
    if not names:
        raise UserError("no `features` are named, and this model has no upsamplers; run `score` and `select` first")
    return names


def _point(text: str) -> tuple[float, float]:
    try:
        x, y = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"`points` has {text!r}; write each as x,y in pixels of the first image") from None
    return x, y
