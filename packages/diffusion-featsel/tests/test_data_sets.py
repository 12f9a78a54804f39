"""Data sets are read as their authors wrote them, and damaged ones refused with the file's name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from diffcore.errors import UserError
from diffusion_featsel.files.masks import list_masked, masks_alone
from diffusion_featsel.files.pairs import read_pairs
from diffusion_featsel.files.spair import read_spair

NAME = "000001-2008_000033-2010_003932:aeroplane"


def annotation(**changes: Any) -> dict[str, Any]:
    """Returns the annotation of a pair of SPair-71k, some fields changed."""
    row = {
        "pair_id": 1,
        "filename": NAME,
        "src_imname": "2008_000033.jpg",
        "trg_imname": "2010_003932.jpg",
        "src_imsize": [500, 366, 3],
        "trg_imsize": [480, 360, 3],
        "src_bndbox": [8, 106, 499, 263],
        "trg_bndbox": [10, 90, 470, 250],
        "category": "aeroplane",
        "src_kps": [[104, 210], [486, 120], [200, 150]],
        "trg_kps": [[90, 200], [450.5, 110], [180, 140]],
        "kps_ids": ["0", "3", "7"],
        "mirror": 0,
    }
    return row | changes


def spair(root: Path, row: Any, *, listed: str | None = NAME) -> Path:
    """Writes a folder of SPair-71k with one pair."""
    folder = root / "PairAnnotation" / "test"
    folder.mkdir(parents=True)
    (folder / f"{NAME}.json").write_text(row if isinstance(row, str) else json.dumps(row))
    if listed is not None:
        (root / "Layout" / "large").mkdir(parents=True)
        (root / "Layout" / "large" / "test.txt").write_text(listed + "\n")
    return root


@pytest.mark.parametrize("listed", [NAME, None])
def test_spair_is_read(tmp_path: Path, listed: str | None) -> None:
    (pair,) = read_spair(spair(tmp_path, annotation(), listed=listed))
    assert pair.source == "JPEGImages/aeroplane/2008_000033.jpg"
    assert pair.target == "JPEGImages/aeroplane/2010_003932.jpg"
    assert (pair.source_size, pair.target_size) == ((366, 500), (360, 480))
    assert pair.target_points.tolist() == [[90, 200], [450.5, 110], [180, 140]]
    assert pair.target_box == (10, 90, 470, 250)
    assert pair.source_box == (8, 106, 499, 263)
    assert pair.box == (160, 460)
    assert pair.category == "aeroplane"
    assert read_spair(tmp_path, categories={"aeroplane"})[0].source == pair.source
    with pytest.raises(UserError, match="there are aeroplane"):
        read_spair(tmp_path, categories={"cat"})
    with pytest.raises(UserError, match="PairAnnotation/val"):
        read_spair(tmp_path, "val")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (annotation(src_kps=[[1, 2, 3]]), "`src_kps` is not a list of positions"),
        (annotation(src_kps=[[1, 2]]), "`src_kps` has 1 points and `trg_kps` 3"),
        (annotation(trg_bndbox=[1, 2, 3]), "`trg_bndbox` is not a box"),
        (annotation(trg_imsize=[0, 360, 3]), "`trg_imsize` is not a size"),
        (annotation(category=7), "`category` is not text"),
        (annotation(src_imname="../../../etc/passwd"), "leads out of"),
        ([annotation()], "is no object"),
        ('{"a": NaN}', "no number of JSON"),
        ("{", "not valid JSON"),
    ],
)
def test_damaged_annotations_are_named(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_spair(spair(tmp_path, row))
    assert "aeroplane" in str(caught.value)


def test_the_short_list_is_read_where_it_is_asked_for(tmp_path: Path) -> None:
    root = spair(tmp_path, annotation(), listed=f"{NAME}\n{NAME}")
    (root / "Layout" / "small").mkdir()
    (root / "Layout" / "small" / "test.txt").write_text(NAME)
    assert len(read_spair(root)) == 2
    assert len(read_spair(root, layout="small")) == 1


@pytest.mark.parametrize("listed", ["../secret", "a\\secret", ".secret", "/secret"])
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, listed: str) -> None:
    with pytest.raises(UserError, match="no name of a pair"):
        read_spair(spair(tmp_path, annotation(), listed=listed))


def test_a_list_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusion_featsel.files.spair._MAX_LIST", 10)
    with pytest.raises(UserError, match="too large for a list"):
        read_spair(spair(tmp_path, annotation()))


def test_damaged_lists_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no name of a pair"):
        read_spair(spair(tmp_path / "a", annotation(), listed="../../secret"))
    with pytest.raises(UserError, match="does not exist"):
        read_spair(spair(tmp_path / "b", annotation(), listed="000002-a-b:cat"))


def pair_list(root: Path, **changes: Any) -> Path:
    """Writes a list of one pair beside its images."""
    Image.new("RGB", (50, 40)).save(root / "a.png")
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (60, 30)).save(root / "b.jpg", exif=exif)
    row = {
        "source_path": "a.png",
        "target_path": str(root.resolve() / "b.jpg"),
        "source_points": [[1, 2.5], [10, 20]],
        "target_points": [[3, 4], [12, 22]],
        "category": "cat",
        "source_bounding_box": [0, 0, 20, 30],
        "target_bounding_box": [1, 2, 21, 32],
    }
    path = root / "pairs.json"
    path.write_text(json.dumps([{name: value for name, value in (row | changes).items() if value is not None}]))
    return path


def test_pair_lists_are_read(tmp_path: Path) -> None:
    (pair,) = read_pairs(pair_list(tmp_path))
    assert (pair.source, pair.target) == ("a.png", "b.jpg")
    assert (pair.source_size, pair.target_size) == ((40, 50), (60, 30))  # b is turned upright
    assert pair.box == (30, 20)
    assert pair.visible is None
    bare = pair_list(tmp_path, category=None, target_bounding_box=None, visible=[True, False])
    (pair,) = read_pairs(bare, tmp_path)
    assert pair.category == ""
    assert pair.target_box is None
    assert pair.counted.tolist() == [True, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source_path": "c.png"}, "no image"),
        ({"source_path": "../a.png"}, "leads out of"),
        ({"source_path": "pairs.json"}, "no readable image"),
        ({"source_points": [[1, 2]]}, "unlike lengths"),
        ({"target_points": None}, "`target_points`"),
        ({"visible": [1, 0]}, "`visible`"),
        ({"visible": [True]}, "unlike lengths"),
    ],
)
def test_damaged_pair_lists_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_pairs(pair_list(tmp_path, **changes))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_those_of_upright_images(tmp_path: Path, orientation: int) -> None:
    path = pair_list(tmp_path)
    exif = Image.Exif()
    exif[274] = orientation
    Image.new("RGB", (60, 30)).save(tmp_path / "b.jpg", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(tmp_path / "b.jpg"))
    assert read_pairs(path)[0].target_size == (upright.height, upright.width)


def test_images_may_lie_in_another_folder(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    path = pair_list(tmp_path / "images", target_path="b.jpg")
    (tmp_path / "list.json").write_bytes(path.read_bytes())
    (pair,) = read_pairs(tmp_path / "list.json", tmp_path / "images")
    assert pair.source_size == (40, 50)
    assert pair.source_box == (0, 0, 20, 30)
    with pytest.raises(UserError, match="there is no image"):
        read_pairs(tmp_path / "list.json")


@pytest.mark.parametrize("text", ["{}", "[]"])
def test_a_file_that_is_no_list_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "pairs.json").write_text(text)
    with pytest.raises(UserError, match="no list of pairs"):
        read_pairs(tmp_path / "pairs.json")


def test_masks_are_read_beside_and_apart(tmp_path: Path) -> None:
    classes = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for folder in ("one/images", "one/masks", "two"):
        (tmp_path / folder).mkdir(parents=True)
    picture = Image.fromarray(np.full((3, 4, 3), 9, np.uint8))
    picture.save(tmp_path / "one/images/x.png")
    picture.save(tmp_path / "one/images/y.png")
    palette = Image.fromarray(classes, "L").convert("P")
    palette.putpalette(list(range(255, -1, -1)) * 3)
    palette.putdata(classes.flatten().tolist())
    palette.save(tmp_path / "one/masks/x.png")
    picture.save(tmp_path / "two/x.jpg")
    Image.fromarray(classes).save(tmp_path / "two/x_mask.png")
    one, two = list_masked(tmp_path / "one"), list_masked(tmp_path / "two")
    assert one.names == ("images/x.png",)
    assert one.without_mask == ("images/y.png",)
    assert two.names == ("x.jpg",)
    assert two.without_mask == ()
    for found in (one, two):
        assert torch.equal(found.mask(0), torch.from_numpy(classes).long())
        assert found.image(0).shape == (3, 3, 4)
        assert len(found) == 1
    assert two.labels((1, 2)).tolist() == [[[5, 7]]]
    with pytest.raises(UserError, match=r"x_mask\.png has the class 10; classes are 0 to 9"):
        two.mask(0, num_classes=10)


def test_masks_lie_in_the_same_folders_as_images(tmp_path: Path) -> None:
    for name in ("images/a/x.jpg", "images/b/x.jpg", "masks/a/x.png", "masks/b/x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2), 7 if "masks/b" in name else 3).save(tmp_path / name)
    found = list_masked(tmp_path)
    assert found.names == ("images/a/x.jpg", "images/b/x.jpg")
    assert found.masks == ("masks/a/x.png", "masks/b/x.png")
    assert found.labels((1, 1)).flatten().tolist() == [3, 7]
    with pytest.raises(UserError, match=r"x\.png has the class 7"):
        found.labels((1, 1), num_classes=7)


def test_all_classes_but_255_must_exist(tmp_path: Path) -> None:
    Image.new("RGB", (2, 1)).save(tmp_path / "x.png")
    Image.fromarray(np.array([[255, 4]], np.uint8)).save(tmp_path / "x_mask.png")
    found = list_masked(tmp_path)
    assert found.mask(0, num_classes=5).tolist() == [[255, 4]]
    with pytest.raises(UserError, match="has the class 4"):
        found.mask(0, num_classes=4)
    Image.fromarray(np.array([[300, 4]], np.uint16)).save(tmp_path / "x_mask.png")
    assert found.mask(0).tolist() == [[300, 4]]
    with pytest.raises(UserError, match="has the class 300"):
        found.mask(0, num_classes=5)


def test_images_and_masks_that_are_too_large_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (4, 3)).save(tmp_path / "x.png")
    Image.new("L", (4, 3)).save(tmp_path / "x_mask.png")
    found = list_masked(tmp_path)
    monkeypatch.setattr("diffusion_featsel.files.masks._MAX_PIXELS", 11)
    with pytest.raises(UserError, match="more than 11 pixels"):
        found.mask(0)
    with pytest.raises(UserError, match=r"x\.png has 4 x 3 pixels; the limit is 11"):
        found.image(0)


def test_a_folder_of_masks_alone_holds_nothing_else(tmp_path: Path) -> None:
    assert masks_alone(tmp_path / "nowhere") is None
    assert masks_alone(tmp_path) is None
    (tmp_path / "a").mkdir()
    for name in ("a/x.png", "y.png"):
        Image.new("L", (2, 2), 3).save(tmp_path / name)
    found = masks_alone(tmp_path)
    assert found is not None
    assert found.names == found.masks == ("a/x.png", "y.png")
    for other in ("z.jpg", "y_mask.png"):
        Image.new("L", (2, 2)).save(tmp_path / other)
        assert masks_alone(tmp_path) is None
        (tmp_path / other).unlink()
    (tmp_path / "masks").mkdir()
    assert masks_alone(tmp_path) is None


def test_masks_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no image with a mask"):
        list_masked(tmp_path)
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "x_mask.png")
    found = list_masked(tmp_path)
    with pytest.raises(UserError, match="has colours"):
        found.mask(0)
    (tmp_path / "x_mask.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    with pytest.raises(UserError, match="no readable PNG"):
        found.mask(0)
    (tmp_path / "x.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"x\.png is not"):
        found.image(0)
