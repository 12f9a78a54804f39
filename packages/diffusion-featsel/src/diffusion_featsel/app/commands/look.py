"""The commands that look at a model: inventory, score, select."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from diffcore.cli import Flag, LoadingAny, emit, load_model
from diffcore.errors import UserError, printable
from diffcore.runtime import Runtime
from diffusion_featsel.app.options import Extraction, FilterName, Images, ModelName
from diffusion_featsel.app.work import Work

if TYPE_CHECKING:
    from diffcore.run import Run, RunMap
    from diffusion_featsel.inventory import Inventory
    from diffusion_featsel.ranking import Ranking

PaperModel = Literal["sd15", "sdxl", "pgv2"]


def inventory(
    model: ModelName,
    patterns: tuple[str, ...] = (),
    *,
    kind: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = (),
    size: int | None = None,
    extras: Flag = False,
    loading: LoadingAny = LoadingAny(),
    runtime: Runtime = Runtime(),
    json: Flag = False,
) -> int:
    """List every inner activation of a model with shape, memory, and share of a forward pass; no weights are needed.

    Shortest form: diffusion-featsel inventory MODEL

    A folder with config.json, or the file itself, is enough.

    Args:
        patterns: Shell patterns on the paper's names, such as 'up-*cross-q'.
        kind: Kinds of activation, such as cross-q or res-out.
        size: Side of the images in pixels; by default that which the model was trained for.
        extras: List kinds that the paper does not count, too.
        json: Print one JSON object with all that is known of each.
    """
    found = _inventory(model, size, loading, runtime)
    rows = found.match(patterns) if patterns else list(found.rows if extras else found.paper or found.rows)
    if kind:
        if unknown := set(kind) - {row.kind for row in found.rows}:
            known = sorted({row.kind for row in found.rows})
            raise UserError(f"`kind` {sorted(unknown)[0]!r} is not in this model; its kinds are {', '.join(known)}")
        rows = [row for row in rows if row.kind in kind]
    if json:
        wanted = {row.name for row in rows}
        table = [row for row in found.to_rows() if row["name"] in wanted]
        emit({"model": found.model_class, "flops": found.flops, "activations": table}, as_json=True)
        return 0
    width = max((len(row.name) for row in rows), default=0)
    print(f"{'activation':<{width}}  {'channels x grid':<17} {'memory':>10}  up to here")
    for row in rows:
        grid = "x".join(map(str, row.grid)) if row.grid else "text"
        print(f"{row.name:<{width}}  {row.channels:>5} x {grid:<9} {_memory(row.megabytes):>10}  {row.cost:>9.1%}")
    total = _memory(sum(row.megabytes for row in rows if not row.derived))
    print(
        f"{len(rows)} activations of {found.model_class}; {total} per image in half precision without maps. The last "
        "column is the share of a forward pass that is run to get there."
    )
    return 0


def _memory(megabytes: float) -> str:
    return f"{megabytes:.2f} MiB" if megabytes >= 0.1 else f"{megabytes * 1024:.2f} KiB"


def _inventory(model: str, size: int | None, loading: LoadingAny, runtime: Runtime) -> "Inventory":
    from diffusion_featsel.files.config import read_meta_backbone
    from diffusion_featsel.inventory import inventory as list_all

    if Path(model).is_dir() or Path(model).suffix == ".json":
        backbone: Any = read_meta_backbone(model)
        side = None if size is None else size // _factor(Path(model))
        return list_all(backbone, size=None if side is None else (side, side))
    loaded = load_model(model, loading, runtime)
    return list_all(loaded, size=None if size is None else (loaded.shape_at(size)[1], loaded.shape_at(size)[2]))


def _factor(folder: Path) -> int:
    """Returns how many pixels a cell of the network's input is wide, from the autoencoder's configuration."""
    from diffcore.io.strictjson import read_untrusted

    path = folder / "vae" / "config.json"
    if not path.is_file():
        return 1
    return 2 ** (len(read_untrusted(path).get("block_out_channels", [0])) - 1)


def score(
    model: ModelName,
    images: Images,
    *,
    filter: FilterName = "measured",
    keep: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = (),
    num_images: int = 64,
    other_t: float | None = None,
    against_paper: PaperModel | None = None,
    extraction: Extraction = Extraction(),
    work: Work = Work(),
) -> int:
    """Rank all activations of a model on your images, without labels.

    Shortest form: diffusion-featsel score MODEL IMAGES

    One pass over the images measures everything; nothing is stored per image.

    Args:
        filter: Rule that crosses out activations beside the ranking: measurements, the paper's rule on names, or none.
        keep: Patterns of names that no filter drops.
        num_images: Largest number of images, spread over the folder; at least 16.
        other_t: Second timestep, to see how much activations depend on it.
        against_paper: Compare the ranking with the paper's tables of this model, which are those of SD 1.5, SDXL and
            Playground v2.
    """
    from diffcore.digests import digest_of_values
    from diffusion_featsel.app.report import components_of, save_components, write_page
    from diffusion_featsel.app.scoring import check, filtered_by, ranked, tell_paper
    from diffusion_featsel.files.ranking import FILE, save_ranking

    if num_images < 16:
        raise UserError(f"`num_images` is {num_images}; ranking needs at least 16")
    loaded, extraction = work.load(model), work.seeded(extraction)
    options = {
        **{"model": model, "images": images, "filter": filter, "keep": list(keep), "num_images": num_images},
        **{"other_t": other_t, "against_paper": against_paper, "extraction": extraction},
    }
    pixels, listed, found = _images(loaded, images, extraction, num_images)
    check(loaded, found, extraction, other_t=other_t, filter=filter, keep=keep, against=against_paper)

    def compute(run: "Run", map: "RunMap") -> dict[str, Any]:
        ranking, first = ranked(loaded, pixels, found, extraction, other_t, map)
        if not run.leading:
            return {}
        filtered = filtered_by(filter, ranking, found, max(pixels.shape[2:]), keep)
        described = {"model": model, "fingerprint": loaded.fingerprint, "extraction": asdict(extraction)}
        save_ranking(run.folder / FILE, ranking, filtered, **described)
        run.table("ranking", ranking.to_rows())
        save_components(run, pixels[0], components_of(first), list(filtered.dropped))
        summary = _summary(ranking, filtered.kept, listed.skipped)
        return summary | (tell_paper(run, ranking.scores(), against_paper) if against_paper else {})

    plan = {
        "activations": len(found.features),
        "images": len(pixels),
        "forward_rows": 3 * len(pixels) + (2 * len(pixels) if other_t is not None else 0),
        "skipped_files": len(listed.skipped),
    }
    inputs = {image.name: image.sha256 for image in listed.distinct}
    return work.job("score", loaded, options, {"images": digest_of_values(inputs)}, volatile=("batch_size",))(
        compute, plan=plan, report=write_page, shown=lambda result: {k: v for k, v in result.items() if k != "skipped"}
    )


def _images(loaded: Any, images: Path, extraction: Extraction, num_images: int) -> Any:
    from diffusion_featsel.app.inputs import images_at

    pixels, listed, found = images_at(loaded, images, extraction, num_images)
    if len(pixels) < 16:
        raise UserError(f"{printable(images, 300)} has {len(pixels)} distinct images; ranking needs at least 16")
    return pixels, listed, found


def _summary(ranking: "Ranking", kept: tuple[str, ...], skipped: Any) -> dict[str, Any]:
    best = [name for name in ranking.scores() if name in kept][:5]
    return {
        "answer": f"Of {len(ranking)} activations, {len(kept)} are kept; the best without labels is {best[0]}."
        if best
        else f"Of {len(ranking)} activations, the filter keeps none; with --filter none, all are kept.",
        "activations": len(ranking),
        "kept": len(kept),
        "images": ranking.num_images,
        "best": best,
        "broken": dict(ranking.broken),
        "skipped": [list(entry) for entry in skipped],
    }


def select(
    run: Path,
    budget: str,
    *,
    labels: str | None = None,
    task: Literal["correspondence", "segmentation"] = "segmentation",
    candidates: int = 24,
    max_size: int = 4,
    ladder: Annotated[bool, Parameter(negative="--no-ladder")] = True,
    beam: int = 1,
    num_classes: int | None = None,
    work: Work = Work(),
) -> int:
    """Choose a small set of activations under a budget, from the run of `score`.

    Shortest form: diffusion-featsel select RUN 8MiB

    Writes selection.json, which `extract`, `evaluate` and Python's FeatureExtractor take. Without labels the ranking
    decides, and what is nearly a copy of something chosen is left out; with labels, what raises the figure most.

    Args:
        run: Run folder of score.
        budget: Largest cost for one image: 8MiB or 3520ch of features, or flops:.6 of the network.
        labels: Labelled data: a folder of images with masks, pairs with key points, or zoo:portraits.
        task: Kind of labels: key points for correspondence, masks for segmentation.
        candidates: Number of activations, best first, that are looked at with labels.
        max_size: Largest number of activations.
        ladder: Whether there must be a coarse and a fine one.
        beam: Number of sets that the search with labels carries on at once; 1 takes the best next one each time.
        num_classes: Number of classes of the masks; by default one more than the largest.
    """
    from diffusion_featsel.app.choosing import choose
    from diffusion_featsel.app.report import write_page

    return choose(
        run,
        budget,
        labels=labels,
        task=task,
        candidates=candidates,
        max_size=max_size,
        ladder=ladder,
        beam=beam,
        num_classes=num_classes,
        work=work,
        report=write_page,
    )
