"""The data set SPair-71k, read from its own folder.

The folder holds `JPEGImages/CATEGORY/NAME.jpg`, `PairAnnotation/SPLIT/ID-SOURCE-TARGET:CATEGORY.json`, and the lists of
each split in `Layout/large/SPLIT.txt`.

References:
    Min et al. 2019, "SPair-71k: A Large-scale Benchmark for Semantic Correspondence".
"""

from collections.abc import Collection
from pathlib import Path
from typing import Literal

from diffcore.errors import UserError, printable
from diffusion_featsel.files.fields import Fields, inside, read_json
from diffusion_featsel.pairs import Pair

Split = Literal["trn", "val", "test"]
_MAX_BYTES = 1_000_000  # of the annotation of one pair
_MAX_LIST = 50_000_000


def read_spair(
    root: str | Path,
    split: Split = "test",
    *,
    layout: Literal["large", "small"] = "large",
    categories: Collection[str] | None = None,
) -> list[Pair]:
    """Reads the pairs of a split; images are named by their paths below the folder.

    Args:
        root: Folder of the data set.
        split: "test" for the 12,234 pairs that results are reported on, "val", or "trn".
        layout: List of pairs that is read; all pairs, or the small list for quick looks.
        categories: Categories that are read; all by default.

    Raises:
        UserError: The folder is not SPair-71k, or an annotation is missing or damaged.
    """
    root = Path(root)
    folder = root / "PairAnnotation" / split
    if not folder.is_dir():
        raise UserError(f"{printable(root)} has no folder PairAnnotation/{split}; give the folder of SPair-71k")
    names = _listed(root / "Layout" / layout / f"{split}.txt") or sorted(path.stem for path in folder.glob("*.json"))
    chosen = [name for name in names if categories is None or name.rpartition(":")[2] in categories]
    if not chosen:
        known = sorted({name.rpartition(":")[2] for name in names})
        raise UserError(f"no pair of split {split} is chosen by `categories`; there are {', '.join(known)}")
    return [_pair(root, folder / f"{name}.json") for name in chosen]


def _listed(path: Path) -> list[str]:
    if not path.is_file():
        return []
    if path.stat().st_size > _MAX_LIST:
        raise UserError(f"{printable(path, 300)} is too large for a list of pairs; get a clean copy of the data set")
    lines = path.read_text(encoding="utf-8", errors="replace").split()
    if wrong := [line for line in lines if "/" in line or "\\" in line or line.startswith(".")]:
        raise UserError(f"{printable(path, 300)} lists {printable(wrong[0])!r}, which is no name of a pair")
    return lines


def _pair(root: Path, path: Path) -> Pair:
    where = printable(path, 300)
    fields = Fields(read_json(path, _MAX_BYTES), where)
    category = fields.text("category")
    source, target = (
        inside(root, f"JPEGImages/{category}/{fields.text(name)}", where) for name in ("src_imname", "trg_imname")
    )
    source_points, target_points = fields.points("src_kps"), fields.points("trg_kps")
    if len(source_points) != len(target_points):
        raise UserError(
            f"{where}: `src_kps` has {len(source_points)} points and `trg_kps` {len(target_points)}; get a clean copy"
        )
    return Pair(
        source,
        target,
        source_points,
        target_points,
        fields.size("src_imsize"),
        fields.size("trg_imsize"),
        target_box=fields.box("trg_bndbox"),
        source_box=fields.box("src_bndbox"),
        category=category,
    )
