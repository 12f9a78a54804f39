"""What the command `correspond` does beside the method: reading two images, and drawing the matches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffcore.errors import UserError, printable
from diffcore.run import Run
from diffusion_featsel.app.inputs import pixels_of_files
from diffusion_featsel.app.pictures import principal_colors
from diffusion_featsel.app.report import save_components, save_strips
from diffusion_featsel.baselines import rescale
from diffusion_featsel.correspond import correspond
from diffusion_featsel.extractor import FeatureExtractor
from diffusion_featsel.files.images import ImageList

_DRAWN = 40  # lines that a picture holds


def matched(
    run: Run,
    extractor: FeatureExtractor,
    pictures: Sequence[Tensor],
    names: tuple[str, str],
    points: Sequence[tuple[float, float]],
    *,
    matcher: Literal["argmax", "soft", "window"],
    mutual: bool,
    flip: bool,
) -> dict[str, Any]:
    """Matches two images, keeps pictures and a table for the report, and returns the summary.

    Args:
        run: Run that keeps the results.
        extractor: Extractor that computes the features.
        pictures: The two images, as `read_pair` reads them.
        names: Names of the two images in the answer.
        points: Positions (x, y) in the first image; none for all cells.
        matcher: How points are matched.
        mutual: Whether points must be matched back.
        flip: Whether the mirrored second image is tried, too.
    """
    sizes = [(picture.shape[1], picture.shape[2]) for picture in pictures]
    prepared = [extractor.protocol.prepare(extractor.model, [picture]).images for picture in pictures]
    inside = (prepared[0].shape[2], prepared[0].shape[3])
    extractor.calibrate(pictures)
    weights = {name: 1 / max(extractor.statistics[name].rms, 1e-12) for name in extractor.names}
    asked = None
    if points:
        asked = rescale(torch.tensor(points, dtype=torch.float32), sizes[0], inside)[None]

    found = correspond(
        lambda images: extractor(images),
        prepared[0],
        prepared[1],
        asked,
        matcher=matcher,
        mutual=mutual,
        flip=flip,
        weights=weights,
        center="pair",
    )
    keep = torch.ones(found.points.shape[1], dtype=torch.bool)
    if found.mutual is not None and (mutual or asked is None):
        keep = found.mutual[0].cpu()
    ours = rescale(found.points[0].cpu().float(), inside, sizes[0])[keep]
    theirs = rescale(found.matched[0].cpu().float(), inside, sizes[1])[keep]
    cosine = found.similarity[0].cpu()[keep]
    rows = [
        {"x": x, "y": y, "found x": u, "found y": v, "cosine": c}
        for (x, y), (u, v), c in zip(ours.tolist(), theirs.tolist(), cosine.tolist(), strict=True)
    ]
    run.table("matches", rows)
    order = cosine.argsort(descending=True)
    drawn = order[torch.linspace(0, len(order) - 1, min(_DRAWN, len(order))).long()] if len(order) else order
    strip = {
        "source": pictures[0].float() / 255,
        "target": pictures[1].float() / 255,
        "points": ours[drawn],
        "found": theirs[drawn],
    }
    shown = f"{len(drawn)} of {len(rows)}" if len(drawn) < len(rows) else str(len(rows))
    save_strips(run, [strip], f"{shown} matched places, with {len(extractor.names)} activations.")
    if asked is not None:
        run.keep_table("scores", rows, "Positions in pixels of each image.")
    colors = principal_colors(extractor.maps(pictures))
    caption = "The first three principal components of the features of both images together, as red, green and blue."
    save_components(run, strip["source"], {"first image": colors[0], "second image": colors[1]}, caption=caption)
    returned = None if found.mutual is None else float(found.mutual.float().mean())
    return {
        "answer": f"{len(rows)} places of {names[0]} were found in {names[1]}"
        + ("" if returned is None else f"; {returned:.0%} of all return to where they came from")
        + ".",
        "matches": rows if asked is not None else len(rows),
        "mutual_share": returned,
        "median_cycle_error": None if found.cycle_error is None else float(found.cycle_error.median()),
        "activations": list(extractor.names),
    }


def read_pair(source: Path, target: Path, points: Sequence[tuple[float, float]]) -> list[Tensor]:
    """Returns the pixels of two image files, after checking that points lie in the first.

    Args:
        source: File of the first image.
        target: File of the second image.
        points: Positions (x, y) in the first image.

    Raises:
        UserError: An image cannot be read, or a point lies outside.
    """
    pictures = []
    for path in (source, target):
        if not path.is_file():
            raise UserError(f"{printable(path, 300)} is no file; give an image")
        listed = ImageList.of(path)
        pictures.append(pixels_of_files(listed, listed.images)[0])
    height, width = pictures[0].shape[1:]
    for x, y in points:
        if not (-0.5 <= x <= width - 0.5 and -0.5 <= y <= height - 0.5):
            raise UserError(f"`points` has {x:g},{y:g}, outside of {printable(source.name)} of {width}x{height} pixels")
    return pictures
