"""The commands that measure features with labels: evaluate, probe."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffcore.errors import UserError
from diffusion_featsel.app.commands.look import PaperModel
from diffusion_featsel.app.options import Extraction, Features, ModelName
from diffusion_featsel.app.work import Work

if TYPE_CHECKING:
    from diffcore.run import Run, RunMap

_IN_THE_REPORT = ("activations", "pck", "by_category", "per_class", "strengths", "missing")
Kind = Literal["ridge", "logistic", "knn", "mlp-ensemble"]


def evaluate(
    model: ModelName,
    data: str,
    *,
    task: Literal["correspondence", "segmentation"] = "correspondence",
    features: Features = (),
    kind: Kind = "ridge",
    matcher: Literal["argmax", "soft", "window"] = "argmax",
    split: Literal["trn", "val", "test"] = "test",
    layout: Literal["large", "small"] = "large",
    num_classes: int | None = None,
    num_train: int | None = None,
    against_paper: PaperModel | None = None,
    fail_below: float | None = None,
    extraction: Extraction = Extraction(),
    work: Work = Work(),
) -> int:
    """Measure features with labels: key points by PCK in all four forms, or masks by mean IoU.

    Shortest form: diffusion-featsel evaluate MODEL DATA --features selection.json

    With --features all every activation is measured alone, in one pass. Exit code 1 means that the figure is below
    --fail-below, for a release's CI.

    Args:
        data: SPair-71k's folder, a list of pairs in JSON, a folder of images with masks, or zoo:portraits.
        task: Kind of labels: key points for correspondence, masks for segmentation.
        kind: Probe for masks; mlp-ensemble is the label-scarce protocol of the paper.
        matcher: Largest cosine, or the expected place over the whole image or around the largest.
        split: Split of SPair-71k; results are reported on test.
        layout: All of SPair-71k's pairs, or its short list.
        num_classes: Number of classes of the masks; by default one more than the largest.
        num_train: Number of training images for masks; by default two thirds.
        against_paper: Compare the order of the activations with the paper's tables of this model; takes every
            activation in them, whatever `features` says.
        fail_below: Smallest acceptable PCK@0.1 per point or mean IoU, from 0 to 1.
    """
    from diffusion_featsel.app.evaluating import evaluated, plan_of
    from diffusion_featsel.app.inputs import check_training, digests
    from diffusion_featsel.app.report import write_page

    if fail_below is not None and not 0 <= fail_below <= 1:
        raise UserError(f"`fail_below` is {fail_below}; give a share from 0 to 1")
    if not features and against_paper is None:
        raise UserError("no `features` are named; give a preset, a selection.json, names of activations, or all")
    loaded, extraction = work.load(model), work.seeded(extraction)
    options = {
        **{"model": model, "data": data, "task": task, "features": list(features), "kind": kind, "matcher": matcher},
        **{"split": split, "layout": layout, "num_classes": num_classes, "num_train": num_train},
        **{"against_paper": against_paper, "fail_below": fail_below, "extraction": extraction},
    }
    asked = plan_of(loaded, data, task, features, against_paper, extraction, split, layout, num_classes)
    if task == "segmentation":
        check_training(num_train, asked.facts["images"])

    def compute(run: "Run", map: "RunMap") -> dict[str, Any]:
        return evaluated(run, asked, kind=kind, matcher=matcher, num_train=num_train)

    job = work.job(
        "evaluate",
        loaded,
        options,
        digests(features, Path(data)) | {"data": asked.digest},
        ("batch_size",),
    )
    return job(
        compute,
        plan=asked.facts,
        report=write_page,
        passed=lambda result: fail_below is None or result["figure"] >= fail_below,
        shown=lambda result: {key: value for key, value in result.items() if key not in _IN_THE_REPORT},
    )


def probe(
    run: Path,
    labels: Path,
    *,
    kind: Kind = "ridge",
    features: Features = (),
    grid: int = 64,
    num_splits: int = 5,
    num_train: int | None = None,
    num_classes: int | None = None,
    work: Work = Work(),
) -> int:
    """Measure what a simple classifier reads from extracted features, over random splits of the images.

    Shortest form: diffusion-featsel probe RUN LABELS

    Args:
        run: Run folder of extract.
        labels: Folder of masks: PNG files with the names of the images, grey values as classes, 255 where a pixel does
            not count.
        kind: Probe; mlp-ensemble is the label-scarce protocol of the paper.
        features: Activations to read from; by default all that were extracted.
        grid: Rows and columns that features and labels are brought to.
        num_splits: Number of random splits.
        num_train: Number of training images; by default two thirds.
        num_classes: Number of classes; by default one more than the largest.
    """
    from diffusion_featsel.app.evaluating import probed
    from diffusion_featsel.app.report import write_page

    return probed(
        run,
        labels,
        kind=kind,
        features=features,
        grid=grid,
        num_splits=num_splits,
        num_train=num_train,
        num_classes=num_classes,
        work=work,
        report=write_page,
    )
