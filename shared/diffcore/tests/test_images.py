import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from diffcore.data import ImageSet, load_images, open_images, resize
from diffcore.errors import UserError
from diffcore.testing.images import encoded, folder_of, zip_of


def picture(width: int = 8, height: int = 8, seed: int = 0, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def named(*names: str) -> dict[str, bytes]:
    return {name: encoded(picture(seed=seed)) for seed, name in enumerate(names)}


@pytest.mark.parametrize("put", [folder_of, zip_of])
def test_classes_labels_and_order(tmp_path, put):
    names = ("dog/b.png", "cat/ü x.png", "dog/a.png", "cat/.hidden.png", "__MACOSX/._a.png")
    loaded = load_images(put(tmp_path, named(*names)))
    assert loaded.names == ("cat/ü x.png", "dog/a.png", "dog/b.png")
    assert loaded.classes == ("cat", "dog")
    assert loaded.labels.tolist() == [0, 1, 1]
    assert loaded.images.dtype == torch.uint8
    expected = np.asarray(picture(seed=0)).transpose(2, 0, 1)
    assert np.array_equal(loaded.images[2].numpy(), expected)
    assert len(loaded) == 3
    assert loaded.skipped == loaded.notes == ()


@pytest.mark.parametrize("put", [folder_of, zip_of])
@pytest.mark.parametrize("root", ["", "data/", "a/b/"])
def test_flat_sets_have_no_labels(tmp_path, put, root):
    loaded = load_images(put(tmp_path, named(f"{root}2.png", f"{root}1.png")))
    assert loaded.labels is None
    assert loaded.classes == ()
    assert loaded.names == (f"{root}1.png", f"{root}2.png")


@pytest.mark.parametrize("put", [folder_of, zip_of])
@pytest.mark.parametrize("root", ["", "data/"])
def test_splits(tmp_path, put, root):
    path = put(tmp_path, named(*(f"{root}{s}/{c}/x.png" for s in ("train", "test") for c in ("cat", "dog"))))
    assert open_images(path, split="test").names == (f"{root}test/cat/x.png", f"{root}test/dog/x.png")
    assert open_images(path, split="test").classes == ("cat", "dog")
    assert open_images(path, split="test/dog").labels is None
    with pytest.raises(UserError, match="several parts: test, train; choose one with `split`"):
        load_images(path)
    with pytest.raises(UserError, match="no folder 'val'; it has test, train"):
        load_images(path, split="val")


def test_a_split_that_holds_everything_is_still_one(tmp_path):
    path = folder_of(tmp_path, named("train/cat/1.png", "train/dog/1.png"))
    assert open_images(path, split="train") == open_images(path)
    assert open_images(path).labels == (0, 1)


def test_ranges_of_the_views():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3)
    loaded = ImageSet(images, None, (), ("a",))
    torch.testing.assert_close(loaded.x0().flatten(), torch.tensor([-1, -0.6, 1]))
    torch.testing.assert_close(loaded.unit().flatten(), torch.tensor([0, 0.2, 1]))


def test_mixed_sizes_name_two_files_and_a_size(tmp_path):
    files = {"a.png": encoded(picture(8, 6)), "b.png": encoded(picture(12, 9))}
    with pytest.raises(UserError, match=r"a\.png is 8 x 6, b\.png is 12 x 9; give them one with `size` 6"):
        load_images(folder_of(tmp_path, files))
    assert load_images(tmp_path, size=6).images.shape == (2, 3, 6, 6)
    with pytest.raises(UserError, match="`size` is 0"):
        load_images(tmp_path, size=0)


def test_bad_files_are_skipped_with_their_reason_or_fatal(tmp_path):
    jpeg = encoded(picture(64, 64), "JPEG")
    files = {
        "cat/good.jpg": jpeg,
        "cat/half.jpg": jpeg[: len(jpeg) // 2],
        "dog/text.png": b"not an image at all",
        "dog/good.png": jpeg,
        "readme.txt": b"hello",
    }
    loaded = load_images(folder_of(tmp_path, files))
    assert loaded.names == ("cat/good.jpg", "dog/good.png")
    assert loaded.labels.tolist() == [0, 1]
    assert [name for name, _ in loaded.skipped] == ["cat/half.jpg", "dog/text.png"]
    assert "truncated" in loaded.skipped[0][1]
    assert "not a PNG" in loaded.skipped[1][1]
    with pytest.raises(UserError, match=r"cat/half\.jpg is damaged: .*truncated.*; remove it, or leave out `strict`"):
        load_images(tmp_path, strict=True)


def test_nothing_to_read(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_images(tmp_path / "absent")
    with pytest.raises(UserError, match="is empty; expected images"):
        load_images(tmp_path)
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(UserError, match=r"no readable image among 1; the first, a\.png, is not a PNG"):
        load_images(tmp_path)
    with pytest.raises(UserError, match="neither a folder nor a zip"):
        load_images(tmp_path / "a.png")
    with pytest.raises(UserError, match="neither a folder nor a zip"):
        load_images("/dev/null")


def test_images_beside_class_folders_are_unclear(tmp_path):
    folder_of(tmp_path, named("cat/1.png", "dog/1.png", "stray.png"))
    with pytest.raises(UserError, match=r"images beside its sub-folders, such as stray\.png"):
        load_images(tmp_path)


def test_devices_loops_and_broken_links_are_left_out(tmp_path):
    folder_of(tmp_path, named("a.png"))
    (tmp_path / "device.png").symlink_to(os.devnull)
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    loaded = load_images(tmp_path)
    assert loaded.names == ("a.png", "b.png")
    assert dict(loaded.skipped)["device.png"] == "is not a regular file"
    assert "No such file" in dict(loaded.skipped)["gone.png"]


def test_names_of_strangers_are_printable(tmp_path):
    (tmp_path / "evil\x1b[31m\n.png").write_bytes(b"x")
    with pytest.raises(UserError) as caught:
        load_images(tmp_path)
    assert "\x1b" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_order_and_threads_do_not_matter(tmp_path):
    path = zip_of(tmp_path, {f"{i:03}.png": encoded(picture(seed=i)) for i in range(40)})
    one, four = load_images(path, threads=1), load_images(path, threads=4)
    assert torch.equal(one.images, four.images)
    assert one.names == four.names == tuple(f"{i:03}.png" for i in range(40))


def test_a_source_travels_to_other_processes(tmp_path):
    source = open_images(zip_of(tmp_path, {f"{i:03}.png": encoded(picture(64, 64, seed=i)) for i in range(20)}))
    expected = [source.read(index) for index in range(20)]
    assert torch.equal(pickle.loads(pickle.dumps(source)).read(1), expected[1])

    def all_equal() -> bool:
        return all(torch.equal(source.read(index), expected[index]) for _ in range(20) for index in range(20))

    # Two processes at once: a shared file position would hand each the bytes of the other.
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if all_equal() else 1)
        finally:
            os._exit(2)
    assert all_equal()
    assert os.waitpid(child, 0)[1] == 0


def smooth(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([127 + 120 * np.sin(x / 9 + c) * np.cos(y / 7 - c) for c in range(3)], -1).clip(0, 255)


@pytest.mark.parametrize("size", [4, 7, 16, 24, 50])
@pytest.mark.parametrize("kind", ["noise", "smooth"])
def test_resizing_equals_pillow_in_float(size, kind):
    side = 24
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3)) if kind == "noise" else smooth(side, side)
    pixels = pixels.astype(np.uint8)
    channels = [Image.fromarray(pixels[..., c].astype(np.float32)) for c in range(3)]
    resized = [np.asarray(channel.resize((size, size), Image.Resampling.BICUBIC)) for channel in channels]
    expected = np.stack(resized).clip(0, 255)
    actual = resize(torch.from_numpy(pixels.transpose(2, 0, 1).copy()), size).numpy()
    assert np.abs(actual - expected).max() <= 0.5 + 1e-2  # rounding, and float32


def test_resizing_equals_cleanfid():
    build = pytest.importorskip("cleanfid.resize").make_resizer
    pixels = smooth(40, 40).astype(np.uint8)
    expected = build("PIL", False, "bicubic", (15, 15))(pixels).transpose(2, 0, 1).clip(0, 255)
    actual = resize(torch.from_numpy(pixels.transpose(2, 0, 1).copy()), 15).numpy()
    assert np.abs(actual - expected).max() <= 0.5 + 1e-2


@pytest.mark.parametrize(("height", "width"), [(10, 16), (16, 10), (11, 16)])
def test_the_centre_is_kept(height, width):
    image = torch.arange(height * width, dtype=torch.uint8).view(1, height, width)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    assert torch.equal(resize(image, side), image[:, top : top + side, left : left + side])
