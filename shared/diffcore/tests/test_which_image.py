"""Which files are images, which class each has, and which prompt."""

import json

import numpy as np
import pytest
from PIL import Image

from diffcore.data import list_images, load_images, load_prompts, open_images
from diffcore.data.pairing import places_of_prompts
from diffcore.errors import UserError
from diffcore.testing.images import encoded, folder_of, zip_of


def images(*names: str) -> dict[str, bytes]:
    return {name: encoded(Image.fromarray(np.full((4, 4, 3), n, np.uint8))) for n, name in enumerate(names)}


def paired(tmp_path, names, text, kind="txt"):
    (tmp_path / f"prompts.{kind}").write_text(text)
    return places_of_prompts(load_prompts(tmp_path / f"prompts.{kind}"), names)


@pytest.mark.parametrize("put", [folder_of, zip_of])
def test_only_images_count(tmp_path, put):
    files = images("a.png", "b.jpeg", "c", "sub/d.PNG")
    texts = {"README.md": b"x", "a.txt": b"a caption", "BM.log": b"BM is no bitmap", "sub/d.json": b"{}", "empty": b""}
    unread = {"e.gif": b"GIF89a", "f.avif": b"", "g.png": b"broken"}  # images all the same: they keep their places
    path = put(tmp_path, {**files, **texts, **unread})
    source = list_images(path)
    assert source.names == ("a.png", "b.jpeg", "c", "e.gif", "f.avif", "g.png", "sub/d.PNG")
    assert set(source.others) == set(texts)
    assert "5 files that are no images" in source.remarks[0]
    assert "1 may be captions of the images beside them" in source.remarks[0]


@pytest.mark.parametrize("stray", ["notes.txt", "metadata/args.json", "train.csv"])
def test_other_files_make_no_class_and_no_error(tmp_path, stray):
    loaded = load_images(folder_of(tmp_path / "set", {**images("cat/1.png", "dog/1.png"), stray: b"x"}), strict=True)
    assert (loaded.classes, loaded.labels.tolist(), loaded.skipped) == (("cat", "dog"), [0, 1], ())
    assert stray in loaded.notes[0]


def test_a_folder_without_images_says_what_is_there(tmp_path):
    with pytest.raises(UserError, match=r"holds no image among 2 files, such as a\.txt"):
        load_images(folder_of(tmp_path / "set", {"a.txt": b"x", "b.npy": b"x"}))


NUMBERED = {
    "not padded": ([f"image_{n}.png" for n in range(12)], True),
    "steps": ([f"step{n}.png" for n in (500, 1000, 10000)], True),
    "in folders": ([f"run/{n}/out.png" for n in range(11)], True),
    "two numbers": ([f"{n} - seed 7.png" for n in range(8, 13)], True),
    "padded": ([f"{n:05d}.png" for n in range(12)], False),
    "words": (["cat.png", "dog.png"], False),
}


@pytest.mark.parametrize("name", NUMBERED)
def test_prompts_go_by_number(tmp_path, caplog, name):
    names, said = NUMBERED[name]
    wanted = {image: n for n, image in enumerate(names)}
    listed = sorted(names)
    found = paired(tmp_path, listed, "".join(f"prompt {n}\n" for n in range(len(names))))
    assert dict(zip(listed, found, strict=True)) == wanted
    assert ("in the order of their numbers" in caplog.text) == said


@pytest.mark.parametrize(
    "names",
    [
        ["img.png", "img (2).png", "img (10).png"],
        ["a1f0.png", "9be11.png", "10c.png"],
        ["2-cat.png", "10-dog.png", "1-cow.png"],
    ],
)
def test_an_unclear_order_is_refused(tmp_path, names):
    with pytest.raises(UserError, match=r"the order of images is unclear.*column file_name"):
        paired(tmp_path, sorted(names), "x\ny\nz\n")


def test_several_images_of_a_prompt(tmp_path):
    by_prompt = [f"{p}_{s}.png" for p in range(3) for s in range(4)]
    assert paired(tmp_path, by_prompt, "x\ny\nz\n") == (0,) * 4 + (1,) * 4 + (2,) * 4
    by_sample = [f"seed{s}_prompt{p}.png" for s in range(4) for p in range(3)]
    with pytest.raises(UserError, match="numbered by sample first"):
        paired(tmp_path, by_sample, "x\ny\nz\n")
    uneven = ["0/a.png", "0/b.png", "1/a.png", "2/a.png", "2/b.png", "2/c.png"]  # one folder for each prompt
    assert paired(tmp_path, uneven, "x\ny\nz\n") == (0, 0, 1, 2, 2, 2)


@pytest.mark.parametrize(
    "names",
    [
        [f"{seed}_{p}.png" for p, seed in enumerate((98211, 123, 55555))],  # a seed of its own for each image
        [f"{seed}_{p:03d}.png" for p in range(3) for seed in (42, 1337)],
        [f"seed{s}_prompt{p}.png" for p in range(3) for s in range(3)],  # as many seeds as prompts
        [f"seed_{s}/{p}.png" for p in range(3) for s in range(3)],
        [f"seed {s}/{p:02d}.png" for p in range(3) for s in range(4)],
    ],
)
def test_images_numbered_by_seed_first_are_refused(tmp_path, names):
    with pytest.raises(UserError, match=r"numbered by sample first, by prompt second.*column file_name"):
        paired(tmp_path, sorted(names), "x\ny\nz\n")


@pytest.mark.parametrize(
    "name",
    [
        lambda p, s: f"{p:05d}-{98211 - 7 * p - s}.png",
        lambda p, s: f"prompt{p}_seed{s}.png",
        lambda p, s: f"prompt_{p}/seed_{s}.png",
        lambda p, s: f"2024-01-0{p + 1}/{p}_{s}.png",
        lambda p, s: f"seed42_sample{p}_{s}.png",
    ],
)
@pytest.mark.parametrize("each", [1, 3])
def test_images_numbered_by_prompt_first_go_in_step(tmp_path, name, each):
    names = {name(p, s): p for p in range(3) for s in range(each)}
    assert paired(tmp_path, sorted(names), "x\ny\nz\n") == tuple(names[image] for image in sorted(names))


def test_an_order_of_names_without_numbers_is_told(tmp_path, caplog):
    assert paired(tmp_path, ["0be.png", "7cc.png"], "x\ny\n") == (0, 1)
    assert "in the order of their names, 0be.png first" in caplog.text


@pytest.mark.parametrize("column", ["img_path", "image_name", "Bild"])
def test_any_column_that_holds_names_of_images_is_followed(tmp_path, column):
    rows = "".join(f"prompt {n},{n},data/{n}.png\n" for n in (3, 1, 2))
    assert paired(tmp_path, ["1.png", "2.png", "3.png"], f"prompt,seed,{column}\n{rows}", "csv") == (1, 2, 0)


def test_numbers_of_images_in_another_order_are_refused(tmp_path):
    names, told = ["1.png", "2.png", "3.png"], r"column id of prompts\.csv names the images in another order"
    assert paired(tmp_path, names, "prompt,id\nx,1\ny,2\nz,3\n", "csv") == (0, 1, 2)
    with pytest.raises(UserError, match=told):
        paired(tmp_path, names, "prompt,id\nx,3\ny,1\nz,2\n", "csv")


@pytest.mark.parametrize(
    ("cell", "place"),
    [
        ("sub/b.png", "sub/b.png"),
        ("./sub/b.png", "sub/b.png"),
        ("sub\\b.png", "sub/b.png"),
        ("b.png", "sub/b.png"),
        ("/data/run 7/sub/b.png", "sub/b.png"),
        ("sub/b", "sub/b.png"),
        ("b", "sub/b.png"),
    ],
)
@pytest.mark.parametrize("column", ["file_name", "Image", "filename"])
def test_a_column_names_files_as_people_write_them(tmp_path, caplog, cell, place, column):
    names = ["a.png", "sub/b.png"]
    found = paired(tmp_path, names, f"prompt,{column}\nx,{cell}\n", "csv")
    assert found == tuple(0 if name == place else -1 for name in names)
    assert "has no prompt for 1 image, such as a.png" in caplog.text


@pytest.mark.parametrize(
    ("names", "rows", "message"),
    [
        (["a/0.png", "b/0.png"], "x,0.png\n", r"may be a/0\.png or b/0\.png"),
        (["a.png", "a.jpg"], "x,a\n", r"may be a\.png or a\.jpg"),
        (["a.png"], "x,a.png\ny,a.png\n", "different prompts on lines 2 and 3"),
    ],
)
def test_names_that_fit_twice_are_refused(tmp_path, names, rows, message):
    with pytest.raises(UserError, match=message):
        paired(tmp_path, names, f"prompt,file_name\n{rows}", "csv")


def test_captions_beside_images_are_prompts(tmp_path, caplog):
    files = {"10.txt": b"ten\n", "9.txt": b"\xef\xbb\xbfnine", "8.caption": b"", "log.txt": b"no caption"}
    folder = folder_of(tmp_path / "set", {**images("10.png", "9.jpg", "8.webp", "7.png"), **files})
    prompts = load_prompts(folder)
    names = list_images(folder).names
    found = {name: place for name, place in zip(names, places_of_prompts(prompts, names), strict=True)}
    told = {name: prompts.prompts[place] for name, place in found.items() if place >= 0}
    assert told == {"10.png": "ten", "9.jpg": "nine", "8.webp": ""}
    assert "no prompt for 1 image, such as 7.png" in caplog.text


def test_captions_that_differ_are_left_out_and_other_files_named(tmp_path):
    texts = {"1.txt": b"one", "1.caption": b"two", "2.TXT": b"three", "2.caption": b"three"}
    prompts = load_prompts(folder_of(tmp_path / "a", {**images("1.png", "2.png"), **texts}))
    assert (prompts.prompts, prompts.columns["file_name"]) == (("three",), ("2.png",))
    assert "line 1 has the captions 1.caption and 1.txt, which differ" in prompts.notes[0]
    folder = folder_of(tmp_path / "b", {**images("1.png"), "metadata.jsonl": b"{}"})
    with pytest.raises(UserError, match=r"give the file of prompts itself, such as metadata\.jsonl"):
        load_prompts(folder)


EDM = [f"{n // 4:05d}/img{n:08d}.png" for n in range(12)]


@pytest.mark.parametrize("put", [folder_of, zip_of])
@pytest.mark.parametrize("root", ["", "cifar10/"])
def test_labels_are_what_dataset_json_says(tmp_path, put, root):
    stated = [[name.replace("/", "\\") if n % 2 else name, n * 5 % 3] for n, name in enumerate(EDM)]
    for labels in (stated, dict(stated)):
        files = {root + name: data for name, data in images(*EDM).items()}
        path = put(tmp_path / "a", {**files, f"{root}dataset.json": json.dumps({"labels": labels}).encode()})
        loaded = load_images(path)
        assert loaded.labels.tolist() == [n * 5 % 3 for n in range(12)]
        assert (loaded.classes, loaded.notes) == (("0", "1", "2"), ())


def test_no_labels_are_no_classes(tmp_path):
    path = zip_of(tmp_path, {**images(*EDM), "dataset.json": b'{"labels": null}'})
    assert (open_images(path).labels, open_images(path).classes) == (None, ())
    other = zip_of(tmp_path / "other", {**images("cat/1.png", "dog/1.png"), "dataset.json": b'{"author": "x"}'})
    assert open_images(other).classes == ("cat", "dog")


@pytest.mark.parametrize(
    "labels", [[[name, 0] for name in EDM[:-1]], [[name, [0.5, 1]] for name in EDM], [[name, -1] for name in EDM], 7]
)
def test_labels_that_do_not_fit_are_refused(tmp_path, labels):
    path = folder_of(tmp_path, {**images(*EDM), "dataset.json": json.dumps({"labels": labels}).encode()})
    with pytest.raises(UserError, match=r"dataset\.json states no class number for .*img000000"):
        open_images(path)


def test_numbered_classes_are_in_the_order_of_their_numbers(tmp_path):
    loaded = load_images(folder_of(tmp_path / "a", images(*(f"{n}/x.png" for n in range(12)))))
    assert loaded.classes == tuple(map(str, range(12)))
    assert [loaded.classes[label] for label in loaded.labels] == [name.split("/")[0] for name in loaded.names]
    assert "label 2 is 2, which sorting as text would give to 10" in loaded.notes[0]
    named = load_images(folder_of(tmp_path / "b", images("n02/x.png", "n10/x.png", "cat/x.png")))
    assert (named.classes, named.notes) == (("cat", "n02", "n10"), ())
    words = load_images(folder_of(tmp_path / "c", images(*(f"{n}_{'ab'[n % 2]}/x.png" for n in range(11)))))
    assert words.classes == tuple(f"{n}_{'ab'[n % 2]}" for n in range(11))
    assert "label 1 is 1_b, which sorting as text would give to 10_a" in words.notes[0]
    beside = open_images(folder_of(tmp_path / "d", images(*(f"{n}/x.png" for n in range(11)), "other/x.png")))
    assert beside.classes == (*map(str, range(11)), "other")


def test_parts_of_a_data_set_are_no_classes(tmp_path):
    folder = folder_of(tmp_path / "a", images("train/1.png", "Test/1.png"))
    with pytest.raises(UserError, match="several parts: Test, train; choose one with `split`"):
        open_images(folder)
    assert open_images(folder, split="train").classes == ()
