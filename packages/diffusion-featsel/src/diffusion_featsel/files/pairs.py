"""Lists of pairs in the form of the published code: a JSON list of objects with paths, points, boxes and category.

Each object has `source_path`, `target_path`, `source_points`, `target_points` (x, y in pixels of the original images),
`category`, and `source_bounding_box`, `target_bounding_box` (left, top, right, bottom). The list of 360 validation
pairs of SPair-71k that published numbers rest on is such a file. Boxes and categories may be missing; points with NaN
are not JSON, so a list `visible` of true and false may stand beside the points.
"""

from pathlib import Path

import torch
from PIL import Image

from diffcore.data.decode import FORMATS
from diffcore.errors import UserError, printable
from diffusion_featsel.files.fields import Fields, inside, read_json
from diffusion_featsel.pairs import Pair

_MAX_BYTES = 100_000_000


def read_pairs(path: str | Path, images: str | Path | None = None) -> list[Pair]:
    """Reads a list of pairs; images are named by their paths below their folder.

    Args:
        path: JSON file with the list.
        images: Folder that paths of images are relative to; the folder of the file by default.

    Raises:
        UserError: The file is no such list, or an image is missing or unreadable.
    """
    path = Path(path)
    root = path.parent if images is None else Path(images)
    rows = read_json(path, _MAX_BYTES)
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{printable(path, 300)} is no list of pairs; give a JSON list of objects")
    sizes: dict[str, tuple[int, int]] = {}
    return [_pair(root, Fields(row, f"{printable(path, 300)}, pair {i}"), sizes) for i, row in enumerate(rows)]


def _pair(root: Path, fields: Fields, sizes: dict[str, tuple[int, int]]) -> Pair:
    source, target = (inside(root, fields.text(name), fields.where) for name in ("source_path", "target_path"))
    for name in (source, target):
        if name not in sizes:
            sizes[name] = _size(root / name, fields.where)
    source_points, target_points = fields.points("source_points"), fields.points("target_points")
    visible = fields.value.get("visible")
    if visible is not None and not (isinstance(visible, list) and all(type(one) is bool for one in visible)):
        raise UserError(f"{fields.where}: `visible` is not a list of true and false; write one for each point")
    if len({len(source_points), len(target_points), *([] if visible is None else [len(visible)])}) > 1:
        raise UserError(f"{fields.where} has lists of points of unlike lengths; give each point in both images")
    return Pair(
        source,
        target,
        source_points,
        target_points,
        sizes[source],
        sizes[target],
        target_box=fields.box("target_bounding_box") if fields.has("target_bounding_box") else None,
        source_box=fields.box("source_bounding_box") if fields.has("source_bounding_box") else None,
        category=fields.text("category") if fields.has("category") else "",
        visible=None if visible is None else torch.tensor(visible, dtype=torch.bool),
    )


def _size(path: Path, where: str) -> tuple[int, int]:
    """Returns height and width of an image as a person sees it, from its header."""
    if not path.is_file():
        raise UserError(f"{where}: there is no image {printable(path, 300)}; give the folder of the images")
    try:
        with Image.open(path, formats=FORMATS) as image:
            turned = image.getexif().get(274, 1) in (5, 6, 7, 8)
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception as error:  # Pillow has many
        raise UserError(f"{printable(path, 300)} is no readable image ({printable(error)}); replace it") from None
