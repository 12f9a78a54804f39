"""Diagnoses a set of images and keeps what a report shows of it."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from diffcore.data import ImageSet
from diffcore.run import Run
from immiscible_noise.diagnose import Diagnosis, diagnose
from immiscible_noise.gallery import make_gallery
from immiscible_noise.train import PixelScale


def diagnose_images(
    images: ImageSet, run: Run, batch_sizes: Sequence[int], k: int, normalisation: str, seed: int
) -> dict[str, Any]:
    """Measures what assigning noise does to images; saves parts `diagnosis` and `gallery`, and a table.

    Args:
        images: The data.
        run: Where the parts go.
        batch_sizes: Batches to try.
        k: Draws per image for nearest-of-k selection.
        normalisation: "symmetric" or "standard".
        seed: Fixes batches and noise.

    Returns:
        The figures of `result.json`.
    """
    scale = PixelScale.of(images, normalisation)
    x0 = scale.encode(images.unit())
    generator = torch.Generator().manual_seed(seed)
    diagnosis = diagnose(x0, labels=images.labels, batch_sizes=batch_sizes, k=k, generator=generator)
    gallery = make_gallery(images, scale, batch_size=min(max(batch_sizes), 256), k=k, seed=seed)
    distances = {f"distances/{name}": values for name, values in gallery.distances.items()}
    pictures = {"images": gallery.images, "independent": gallery.independent, "assigned": gallery.assigned}
    run.save(
        "gallery",
        pictures | distances,
        batch_size=gallery.batch_size,
        rounds=gallery.rounds,
        pairings=list(gallery.distances),
    )
    rows = _rows(diagnosis)
    run.save("diagnosis", {}, rows=rows, recommendation=asdict(diagnosis.recommendation))
    run.table("diagnosis", rows)
    named = {f"{row['pairing']}, batch {row['batch_size']}": row for row in rows}
    chosen = diagnosis.recommendation
    condition = " --class-conditional --condition block" if chosen.pairing == "blocks" else ""
    options = (
        "--method vanilla" if chosen.strength == 0 else f"--method assignment --strength {chosen.strength:g}{condition}"
    )
    return {
        "options_of_train": options,
        "recommendation": diagnosis.recommendation.why,
        "pairing": diagnosis.recommendation.pairing,
        "strength": diagnosis.recommendation.strength,
        "reduction": {name: row["reduction"] for name, row in named.items()},
        "leak": {name: row["leak"] for name, row in named.items() if row["leak"] is not None},
    }


def _rows(diagnosis: Diagnosis) -> list[dict[str, Any]]:
    rows = []
    for s in diagnosis.statistics:
        row = {name: getattr(s, name) for name in ("pairing", "batch_size", "reduction", "tilt", "norm_ratio")}
        row["main_direction_variance"] = s.main_direction_variance
        row["leak"] = None if s.leak is None else s.leak.accuracy
        row["leak_error"] = None if s.leak is None else s.leak.standard_error
        row["chance"] = None if s.leak is None else s.leak.chance
        rows.append(row)
    return rows
