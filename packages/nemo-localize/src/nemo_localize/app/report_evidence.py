"""The part of an audit's report that ranks captions by evidence, and shows it."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffcore.metrics import resize
from diffcore.report import Report, histogram
from diffcore.run import Run
from nemo_localize.evidence import Evidence


def save_evidence(
    run: Run,
    evidence: Evidence,
    images: Mapping[str, Float[Tensor, "seeds c height width"]],
    originals: Mapping[str, Float[Tensor, "_ c height width"]] | None = None,
) -> None:
    """Keeps for the report how an audit judged each caption, and images of those with most evidence.

    Args:
        run: Run folder of the audit.
        evidence: Verdicts and looks of the audit.
        images: Images of the captions to show, in their order.
        originals: Training images by caption, where they are known.
    """
    looks = {look.prompt: look for look in evidence.found.looks}
    rows = [
        {
            "number": number,
            "caption": prompt,
            "verdict": verdict,
            "likeness": looks[prompt].typical if prompt in looks and looks[prompt].error is None else None,
            "upper tenth": looks[prompt].upper if prompt in looks and looks[prompt].error is None else None,
            "consistency": evidence.consistency[prompt],
        }
        for number, (prompt, verdict) in enumerate(evidence.verdicts.items(), 1)
    ]
    known = {
        f"original-{place}": originals[prompt][:1]
        for place, prompt in enumerate(images)
        if originals and prompt in originals
    }
    usual, calibration = evidence.found.usual, evidence.calibration
    run.save(
        "evidence",
        {**{f"seeds-{place}": own for place, own in enumerate(images.values())}, **known},
        rows=rows,
        shown=list(images),
        ordinary=[look.typical for look in usual.looks],
        mistaken=[look.prompt for look in usual.looks if usual.verdict(look) == "memorised"],
        memorised_above=usual.memorised_above,
        undecided_above=usual.undecided_above,
        telling=usual.telling,
        tau=calibration.tau,
        interval=calibration.interval,
        references=calibration.num_prompts,
        source=evidence.source,
    )
    run.table("captions", rows)


def add_evidence(report: Report, run: Run) -> None:
    """Adds the captions by evidence: their images, how alike these are, and the verdicts."""
    part = run.load("evidence")
    rows, told = part.fields["rows"], part.fields
    report.section("Captions, by evidence")
    if not rows:
        report.text("No caption has a first step to compare; result.json and results.jsonl say why.")
        return
    images = [part.tensors[f"seeds-{place}"] for place in range(len(told["shown"]))]
    originals = [part.tensors.get(f"original-{place}") for place in range(len(images))]
    columns = [f"seed {number}" for number in range(1, len(images[0]) + 1)]
    if any(original is not None for original in originals):
        blank = torch.ones_like(images[0][:1])
        images = [
            torch.cat([own, _sized(original, own) if original is not None else blank])
            for own, original in zip(images, originals, strict=True)
        ]
        columns.append("training image")
    report.images(
        visible(torch.cat(images)),
        "The captions of most evidence, numbered as in the table: what the model generates for each from other seeds, "
        "in few steps. Seeds of a memorised caption agree.",
        row_labels=[str(number) for number in range(1, len(images) + 1)],
        column_labels=columns,
    )
    drawn = [row["likeness"] for row in rows if row["likeness"] is not None]
    figure = histogram(
        {f"{len(drawn)} audited captions": drawn, f"{len(told['ordinary'])} ordinary ones": told["ordinary"]},
        x_label="likeness of images from two seeds (median over pairs)",
        bins=40,
        threshold=told["memorised_above"],
        threshold_label=f"memorised above {told['memorised_above']:.3f}",
    )
    report.plot("evidence", figure, f"How alike images are among seeds, {len(drawn)} captions.")
    if told["mistaken"]:
        named = ", ".join(f"“{prompt}”" for prompt in told["mistaken"])
        report.text(f"Some ordinary captions look memorised themselves; leave them out next time: {named}.")
    report.table(
        [
            {
                "caption": f"{row['number']}. {row['caption']}",
                "verdict": row["verdict"],
                "images alike": row["likeness"],
                "top tenth": row["upper tenth"],
                "first steps alike": row["consistency"],
            }
            for row in rows
        ],
        _told(told),
    )


def _told(told: Mapping[str, Any]) -> str:
    """Returns the text that explains the columns of the table, and the thresholds of the verdicts."""
    text = (
        "Images alike: what half of the pairs of seeds reach, or half of the seeds to the training image; beside it "
        f"what the top tenth reaches. Measured in {told['source']}. Memorised: the first is above "
        f"{told['memorised_above']:.3f}; undecided: the second is above {told['undecided_above']:.3f}. Both follow "
        f"from images of {len(told['ordinary'])} ordinary captions. "
    )
    if not told["telling"]:
        text += "Ordinary captions give images that are as alike, so images do not tell memories here. "
    text += "A dash: not generated, since its first steps are ordinary. "
    text += "First steps alike: the largest likeness of two seeds"
    tau = f"the threshold is {told['tau']:.3f}"
    if told["interval"] is not None:
        tau += f" (95 % interval {told['interval'][0]:.3f} to {told['interval'][1]:.3f})"
    return f"{text}; {tau}, from {told['references']} ordinary captions."


def _sized(images: Tensor, like: Tensor) -> Tensor:
    """Returns images in the size of others."""
    return resize(images, (like.shape[-2], like.shape[-1])).clamp(0, 1).to(like)


def visible(images: Tensor) -> Tensor:
    """Returns images as they are, and of latents the first three channels."""
    return images if images.shape[1] in (1, 3) else images[:, :3]
