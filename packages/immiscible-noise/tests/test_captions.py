"""Captions of images, from every place where people keep them."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffcore.data import load_images
from diffcore.errors import UserError
from immiscible_noise.study.captions import read_captions


def paint(folder: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(folder / name)
    return folder


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    return paint(tmp_path / "flat", ["a.png", "b.png", "c.png"])


def test_a_text_file_beside_each_image(flat: Path):
    for name in "abc":
        (flat / f"{name}.txt").write_text(f" a picture of {name}\n")
    found = read_captions(flat, load_images(flat))
    assert found.captions == ("a picture of a", "a picture of b", "a picture of c")
    assert len(found.images) == 3


def test_an_image_without_a_caption_costs_only_itself(flat: Path, caplog: pytest.LogCaptureFixture):
    (flat / "a.txt").write_text("first")
    (flat / "b.txt").write_bytes(b"not \xff utf-8")
    (flat / "c.txt").write_text("third")
    with caplog.at_level(logging.WARNING):
        found = read_captions(flat, load_images(flat))
    assert found.captions == ("first", "third")
    assert found.images.names == ("a.png", "c.png")
    assert torch.equal(found.images.images, load_images(flat).images[[0, 2]])
    assert "UTF-8" in caplog.text
    assert "b.png" in caplog.text


def test_a_table_goes_before_text_files_and_names_its_images(flat: Path):
    rows = [{"file_name": "c.png", "text": "third"}, {"file_name": "a.png", "text": "first"}]
    (flat / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (flat / "b.txt").write_text("second")
    found = read_captions(flat, load_images(flat))
    assert dict(zip(found.images.names, found.captions, strict=True)) == {"a.png": "first", "c.png": "third"}


def test_a_table_of_another_place(flat: Path, tmp_path: Path):
    (tmp_path / "told.csv").write_text("file_name,caption\na.png,one\nb.png,two\nc.png,three\n")
    assert read_captions(flat, load_images(flat), table=tmp_path / "told.csv").captions == ("one", "two", "three")


def test_names_of_class_folders_and_one_prompt_for_all(tmp_path: Path):
    data = paint(tmp_path / "classes", ["toy_dog/1.png", "toy_dog/2.png", "cat/1.png"])
    images = load_images(data)
    assert read_captions(data, images).captions == ("cat", "toy dog", "toy dog")
    told = read_captions(data, images, prompt="a photo of {class}, sunny")
    assert told.captions == ("a photo of cat, sunny", "a photo of toy dog, sunny", "a photo of toy dog, sunny")


def test_where_there_are_none_it_says_what_to_do(flat: Path):
    with pytest.raises(UserError, match=r"no captions: put a \.txt"):
        read_captions(flat, load_images(flat))
    with pytest.raises(UserError, match="no folder for each class"):
        read_captions(flat, load_images(flat), prompt="a {class}")
    assert read_captions(flat, load_images(flat), prompt="a sks toy").captions == ("a sks toy",) * 3
    (flat / "a.txt").write_text("first")
    archive = Path(shutil.make_archive(str(flat.parent / "packed"), "zip", flat))
    with pytest.raises(UserError, match="is an archive, inside which no captions are read: unpack it"):
        read_captions(archive, load_images(archive))
