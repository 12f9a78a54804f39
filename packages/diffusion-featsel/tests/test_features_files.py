"""Features on disk: read back as computed, resumed to the same bytes, and refused where runs would mix."""

import hashlib
import importlib
import json
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffcore.errors import CorruptArtifactError, MachineError, RunMismatchError, UserError
from diffcore.io import files
from diffcore.models import from_pipeline
from diffcore.testing import tiny
from diffusion_featsel.extract import Batch, extract, fit_projections, to_storage
from diffusion_featsel.extractor import FeatureExtractor
from diffusion_featsel.files.features import SCHEMA, StoredFeatures, plan_features, write_features
from diffusion_featsel.files.images import ImageList
from diffusion_featsel.files.latents import LatentFolder, codec_fingerprint
from diffusion_featsel.finite import NonFiniteError
from diffusion_featsel.inventory import inventory
from diffusion_featsel.protocol import Protocol

COARSE, FINE = "mid-vit-out", "up-level0-upsampler-out"
ONE = (64 * 16 + 64 * 64) * 2  # bytes of one image's features
SHARD = 4 * ONE + 4096  # holds four images


@pytest.fixture(scope="module")
def model():
    return from_pipeline(tiny.pipeline("sd15"))


@pytest.fixture(scope="module")
def extractor_of(model):
    return partial(FeatureExtractor, model, [COARSE, FINE], listed=inventory(model, num_text=77))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Nine images, of which two show the same as others; a file that is none, and one that is cut."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(7):
        Image.fromarray(rng.integers(0, 256, (20, 18 + number, 3), dtype=np.uint8)).save(root / f"{number}.png")
    Image.open(root / "1.png").save(root / "same-as-1.tiff")
    Image.open(root / "3.png").save(root / "same-as-3.bmp")
    (root / "cut.png").write_bytes((root / "2.png").read_bytes()[:400])
    (root / "notes.txt").write_text("no image")
    return root


@pytest.fixture(scope="module")
def images(folder):
    return ImageList.of(folder)


@pytest.fixture(scope="module")
def plan(extractor_of, images):
    return plan_features(extractor_of(), images, batch_size=2, shard_bytes=SHARD)


@pytest.fixture(scope="module")
def stored(plan, tmp_path_factory):
    return StoredFeatures.open(write_features(tmp_path_factory.mktemp("stored") / "features", plan))


def bytes_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_images_of_any_kind_are_listed_once(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "a.png")
    picture.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "b.png", exif=_turned())
    picture.convert("CMYK").save(tmp_path / "c.tiff")
    picture.convert("L").save(tmp_path / "d.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / "e.png")
    clear = picture.convert("RGBA")
    clear.putalpha(0)
    clear.save(tmp_path / "f.png")
    frames = [Image.fromarray(np.full((6, 8), value, np.uint8)) for value in (0, 128, 255)]
    frames[0].save(tmp_path / "g.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "h.png").write_bytes((tmp_path / "a.png").read_bytes()[:100])
    (tmp_path / "i.jpg").write_bytes(b"")
    Image.new("RGB", (3, 3)).save(tmp_path / "j.ppm")
    found = ImageList.of(tmp_path)
    names = ["a.png", "b.png", "c.tiff", "d.png", "e.png", "f.png", "g.gif"]
    assert [image.name for image in found.images] == names
    assert dict(found.skipped).keys() == {"h.png", "i.jpg", "j.ppm"}
    assert found.images[0].sha256 == found.images[1].sha256  # upright
    assert [image.name[0] for image in found.distinct] == list("adefg")  # and from CMYK
    assert {image.original for image in found.images} == {(6, 8)}
    with pytest.raises(UserError, match=r"a\.png, has 8 x 6 pixels; the limit is 47"):
        ImageList.of(tmp_path, max_pixels=47)
    assert found.images[6].notes == ("is animated; the first of its 3 frames is used",)
    read = dict(zip("abcdefg", found.read(found.images), strict=True))
    assert (read["a"] == pixels).all()
    assert (read["f"] == 255).all()
    assert (read["g"] == 0).all()
    assert (read["e"] == pixels[..., :1]).all()
    (tmp_path / "a.png").write_bytes((tmp_path / "d.png").read_bytes())
    with pytest.raises(UserError, match=r"a\.png has changed since it was listed"):
        found.read(found.images[:1])
    with pytest.raises(UserError, match=r"a\.png has changed since it was listed"):
        found.pictures(found.images[:1])
    with pytest.raises(UserError, match=r"no readable image among 1 files; the first, i\.jpg, is not"):
        ImageList.of(tmp_path / "i.jpg")
    assert [image.name for image in ImageList.of(tmp_path / "d.png").images] == ["d.png"]
    with zipfile.ZipFile(tmp_path / "all.ZIP", "w") as archive:
        archive.write(tmp_path / "d.png", "in/d.png")
    assert [image.name for image in ImageList.of(tmp_path / "all.ZIP").images] == ["in/d.png"]


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_what_is_stored_is_what_is_computed(stored, extractor_of, images):
    assert stored.images == (*(f"{number}.png" for number in range(7)), "same-as-1.tiff", "same-as-3.bmp")
    assert stored.names == (COARSE, FINE)
    assert [name for name, _ in stored.description["skipped"]] == ["cut.png"]
    pixels = images.read(images.distinct)
    for start in range(0, 7, 2):
        found = extractor_of()(pixels[start : start + 2])
        for name in (COARSE, FINE):
            assert torch.equal(stored.maps(name, list(range(7))[start : start + 2]), found[name].half())
    assert torch.equal(stored.read(FINE, "same-as-3.bmp"), stored.read(FINE, "3.png"))
    assert stored.index[7]["row"] == stored.index[1]["row"]
    row = stored.index[5]
    assert (row["shard"], row["row"], row["original"], row["seed"], row["t"]) == (1, 1, [20, 23], 0, [50.0])
    assert (row["sha256"], row["image"]) == (images.images[5].sha256, "5.png")
    assert tuple(stored.maps(COARSE).shape) == (9, 64, 4, 4)
    stored.verify()
    with pytest.raises(KeyError, match="no activation 'x' is stored"):
        stored.read("x", 0)
    with pytest.raises(KeyError, match=r"no image 'x\.png'"):
        stored.read(FINE, "x.png")


def test_shards_are_at_most_as_large_as_said_and_name_their_schema(stored):
    shards = sorted((stored.folder / "features").glob("*.safetensors"))
    assert [path.name for path in shards] == ["000000.safetensors", "000001.safetensors"]
    for path in shards:
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        assert header["__metadata__"] == {"schema": SCHEMA}
        assert set(header) == {"__metadata__", COARSE, FINE}
        assert len(data) <= SHARD


def test_an_interrupted_extraction_ends_with_the_same_bytes(plan, stored, tmp_path, monkeypatch):
    whole = bytes_of(stored.folder)
    writes = []
    real = files.write_whole
    for stop in range(1, 6):  # description, tensors and rows of two shards
        target = tmp_path / str(stop)
        writes.clear()

        def failing(path, data, stop=stop):
            if len(writes) == stop:
                raise MachineError("the disk is full")
            writes.append(path)
            real(path, data)

        monkeypatch.setattr(files, "write_whole", failing)
        with pytest.raises(MachineError):
            write_features(target, plan)
        monkeypatch.setattr(files, "write_whole", real)
        if stop < 5:
            with pytest.raises((UserError, CorruptArtifactError)):
                StoredFeatures.open(target)
        write_features(target, plan)
        assert bytes_of(target) == whole


def test_processes_share_the_shards_to_the_same_bytes(plan, stored, tmp_path):
    write_features(tmp_path / "shared", plan, rank=1, processes=2)
    assert sorted(path.name for path in tmp_path.rglob("0*")) == ["000001.json", "000001.safetensors"]
    with pytest.raises(UserError, match="holds an extraction that is not finished"):
        StoredFeatures.open(tmp_path / "shared")
    write_features(tmp_path / "shared", plan, rank=0, processes=2)
    assert bytes_of(tmp_path / "shared") == bytes_of(stored.folder)


def test_runs_of_other_settings_are_refused(plan, stored, extractor_of, images, tmp_path):
    other = plan_features(extractor_of(t=100), images, batch_size=2, shard_bytes=SHARD)
    with pytest.raises(RunMismatchError, match=r"holds features of another t \(\[50.0\], not \[100.0\]\)"):
        write_features(stored.folder, other)
    seeded = plan_features(extractor_of(seed=1), images, batch_size=2, shard_bytes=SHARD)
    write_features(tmp_path / "seeded", seeded)
    name = "features/000000.safetensors"
    for suffix in (".safetensors", ".json"):
        foreign = (tmp_path / "seeded" / name).with_suffix(suffix)
        (tmp_path / "mixed" / "features").mkdir(parents=True, exist_ok=True)
        (tmp_path / "mixed" / name).with_suffix(suffix).write_bytes(foreign.read_bytes())
    for rest in ("features.json", "index.jsonl", "features/000001.safetensors", "features/000001.json"):
        (tmp_path / "mixed" / rest).write_bytes((stored.folder / rest).read_bytes())
    with pytest.raises(RunMismatchError, match=r"shard 000000 in .* is of another extraction"):
        StoredFeatures.open(tmp_path / "mixed")
    # An extraction into this folder makes the foreign shard again.
    write_features(tmp_path / "mixed", plan)
    assert bytes_of(tmp_path / "mixed") == bytes_of(stored.folder)
    shard = tmp_path / "mixed" / name
    data = bytearray(shard.read_bytes())
    shard.write_bytes(data[:-1])
    write_features(tmp_path / "mixed", plan)  # and one that was cut
    assert bytes_of(tmp_path / "mixed") == bytes_of(stored.folder)
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(CorruptArtifactError, match=r"000000\.safetensors was altered"):
        StoredFeatures.open(tmp_path / "mixed").verify()
    described = tmp_path / "mixed" / "features.json"
    described.write_text(described.read_text().replace(SCHEMA, "diffusion-featsel/features@9"))
    with pytest.raises(CorruptArtifactError, match="features@9"):
        StoredFeatures.open(tmp_path / "mixed")


@pytest.mark.parametrize(
    ("settings", "lengths"),
    [
        ({"batch_size": 1}, [4, 3]),
        ({"batch_size": 3}, [3, 3, 1]),
        ({"batch_size": 5}, [4, 3]),
        ({"batch_size": 1, "shard_bytes": SHARD - 1}, [3, 3, 1]),
        ({"batch_size": 1, "storage": "float32"}, [2, 2, 2, 1]),
    ],
)
def test_shards_hold_whole_batches_where_they_can(extractor_of, images, settings, lengths):
    plan = plan_features(extractor_of(), images, **{"shard_bytes": SHARD} | settings)
    assert [len(shard) for shard in plan.shards] == lengths


def test_a_plan_depends_on_names_and_pixels_of_images_and_on_the_model(extractor_of, plan, folder, model, tmp_path):
    assert plan.description["model"]["fingerprint"] == model.fingerprint
    found = []
    for name, source in (("0.png", "0.png"), ("0.png", "0.png"), ("0.png", "1.png"), ("1.png", "0.png")):
        path = tmp_path / str(len(found)) / name
        path.parent.mkdir()
        path.write_bytes((folder / source).read_bytes())
        found.append(plan_features(extractor_of(), ImageList.of(path)).fingerprint)
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_images_that_fail_are_named_and_not_in_the_index(plan, tmp_path, monkeypatch):
    """The second image of every batch fails, and the second batch holds numbers that need bfloat16."""
    module = importlib.import_module("diffusion_featsel.files.features")

    def partly(*args, **kwargs):
        for number, found in enumerate(extract(*args, **kwargs)):
            kept = {
                name: maps[:1].to(torch.bfloat16 if number else maps.dtype) for name, maps in found.features.items()
            }
            failed = {1: "is NaN"} if len(found.rows) > 1 else {}
            yield replace(found, features=kept, rows=(0,), failed=failed)

    monkeypatch.setattr(module, "extract", partly)
    found = StoredFeatures.open(write_features(tmp_path / "partly", plan))
    assert found.failed == dict.fromkeys(("1.png", "3.png", "5.png"), "is NaN")
    assert found.images == ("0.png", "2.png", "4.png", "6.png")
    assert found.read(FINE, "0.png").dtype == torch.bfloat16
    assert found.index[1]["row"] == 1


def test_kept_latents_change_nothing(plan, stored, extractor_of, images, tmp_path, model, monkeypatch):
    write_features(tmp_path / "first", plan, latents=tmp_path / "latents")
    assert bytes_of(tmp_path / "first") == bytes_of(stored.folder)
    encodings = []
    real = model.codec.posterior
    monkeypatch.setattr(type(model.codec), "posterior", lambda self, *a, **k: encodings.append(1) or real(*a, **k))
    write_features(tmp_path / "second", plan, latents=tmp_path / "latents")
    assert not encodings
    assert bytes_of(tmp_path / "second") == bytes_of(stored.folder)
    later = plan_features(extractor_of(t=300, prompt="a cat", draws=2), images, batch_size=2, shard_bytes=SHARD)
    cached = StoredFeatures.open(write_features(tmp_path / "third", later, latents=tmp_path / "latents"))
    assert not encodings
    fresh = StoredFeatures.open(write_features(tmp_path / "fourth", later))
    assert torch.equal(cached.maps(FINE), fresh.maps(FINE))
    # Other sizes and draws from the posterior have their own place.
    write_features(tmp_path / "fifth", plan_features(extractor_of(size=32), images), latents=tmp_path / "latents")
    assert encodings


def test_latents_are_kept_apart_by_autoencoder_and_protocol(model, tmp_path):
    kept = LatentFolder(tmp_path, model, Protocol())
    kept.put([1, 2], (16, 16), torch.zeros(2, 4, 8, 8), torch.ones(2, 4, 8, 8))
    assert kept.get([2, 1], (16, 16)) is not None
    assert kept.get([1, 3], (16, 16)) is None
    assert kept.get([1], (32, 16)) is None
    for other in (Protocol(mode="crop"), Protocol(sample=True), Protocol.paper()):
        assert LatentFolder(tmp_path, model, other).get([1], (16, 16)) is None
    drawn, paper = (LatentFolder(tmp_path, model, protocol) for protocol in (Protocol(sample=True), Protocol.paper()))
    mean, std = torch.rand(1, 4, 8, 8), torch.rand(1, 4, 8, 8)
    drawn.put([1], (16, 16), mean, std)
    assert paper.get([1], (16, 16)) is None
    found, mode = drawn.get([1], (16, 16)), kept.get([1], (16, 16))
    assert found is not None
    assert mode is not None
    assert torch.equal(found[0], mean)
    assert torch.equal(found[1], std)
    assert not mode[1].any()
    for whole in tmp_path.rglob("*1.safetensors"):
        if "posterior" in str(whole):
            whole.write_bytes(next(tmp_path.rglob("*-mode/**/*1.safetensors")).read_bytes())
    assert drawn.get([1], (16, 16)) is None
    pipe = tiny.pipeline("sd15", 1)
    fingerprints = {codec_fingerprint(model), codec_fingerprint(from_pipeline(pipe))}
    pipe.vae.register_to_config(scaling_factor=0.5)
    assert len(fingerprints | {codec_fingerprint(from_pipeline(pipe))}) == 3
    path = next(tmp_path.rglob("*-mode/**/*1.safetensors"))
    path.write_bytes(path.read_bytes()[:-4])
    assert kept.get([1], (16, 16)) is None
    with pytest.raises(UserError, match="has no autoencoder"):
        LatentFolder(tmp_path, tiny.model("unet2d"), Protocol())


def test_features_can_be_projected_and_the_basis_is_stored(extractor_of, images, stored, tmp_path):
    extractor = extractor_of()
    plan = plan_features(extractor, images, project="pca:3", batch_size=2, shard_bytes=SHARD)
    assert not extractor.projections
    small = StoredFeatures.open(write_features(tmp_path / "pca", plan))
    projections = small.projections()
    assert small.description["activations"][FINE]["channels"] == 3
    full = extractor_of()(images.read(images.distinct[:2]))[FINE]
    torch.testing.assert_close(small.maps(FINE, [0, 1]).float(), projections[FINE](full), atol=2e-3, rtol=2e-3)
    rows = stored.maps(FINE, range(7)).float().movedim(1, -1).flatten(0, -2)
    values = torch.linalg.svdvals((rows - rows.mean(0)).double()).square()
    assert projections[FINE].explained == pytest.approx(float(values[:3].sum() / values.sum()), abs=1e-3)
    plan = plan_features(extractor, images, project="random:5")
    random = StoredFeatures.open(write_features(tmp_path / "random", plan))
    assert tuple(random.read(COARSE, 0).shape) == (5, 4, 4)
    for wrong in ("pca", "pca:0", "svd:3"):
        with pytest.raises(UserError, match="give 'pca:D' or 'random:D'"):
            fit_projections(extractor, [], wrong)


def test_each_image_may_have_its_prompt(extractor_of, images, tmp_path):
    prompts = {image.name: "a dog" for image in images.images} | {"same-as-1.tiff": "a cat", "4.png": "a cat"}
    plan = plan_features(extractor_of(), images, prompts=prompts, batch_size=2)
    found = StoredFeatures.open(write_features(tmp_path / "prompts", plan))
    assert found.description["prompts"] == ["a cat", "a dog"]
    by_name = {row["image"]: row for row in found.index}
    assert (by_name["3.png"]["prompt"], by_name["4.png"]["prompt"]) == (1, 0)
    assert by_name["same-as-1.tiff"]["row"] != by_name["1.png"]["row"]
    assert by_name["same-as-3.bmp"]["row"] == by_name["3.png"]["row"]
    cat = extractor_of(prompt="a cat")(images.read(images.images[4:5]))[FINE]
    torch.testing.assert_close(found.read(FINE, "4.png").float(), cat[0], atol=2e-3, rtol=2e-3)
    with pytest.raises(UserError, match=r"8 images have no prompt, such as 1\.png"):
        plan_features(extractor_of(), images, prompts={"0.png": ""})


def test_images_of_their_own_proportions_share_shards_by_size(extractor_of, images, tmp_path):
    plan = plan_features(extractor_of(mode="native"), images, batch_size=2)
    found = StoredFeatures.open(write_features(tmp_path / "native", plan))
    assert found.read(FINE, "0.png").shape == (64, 10, 8)
    assert found.read(FINE, "6.png").shape == (64, 10, 12)
    assert found.description["size"] is None
    wide = ImageList.of(images.source.files.path / "0.png")
    one = 64 * (10 * 8 + 5 * 4) * 2
    assert len(plan_features(extractor_of(mode="native"), wide, shard_bytes=one + 4096).shards) == 1
    with pytest.raises(UserError, match=f"one image take {one:,} bytes"):
        plan_features(extractor_of(mode="native"), wide, shard_bytes=one + 4095)


def test_the_published_protocol_reads_files_in_their_own_mode(model, tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 4), dtype=np.uint8), "RGBA")
    picture.save(tmp_path / "a.png")
    extractor = FeatureExtractor(model, [COARSE], protocol="paper")
    images = ImageList.of(tmp_path)
    found = StoredFeatures.open(write_features(tmp_path / "out", plan_features(extractor, images)))
    expected = extractor([picture], keys=[images.images[0].key])[COARSE]
    torch.testing.assert_close(found.read(COARSE, 0), expected[0].half())


def test_numbers_that_half_precision_cannot_hold_are_kept_in_another():
    features = {"small": torch.tensor([1.0, -2.0]), "large": torch.tensor([-7e4, 1.0])}
    kept = to_storage(features, "auto")
    assert (kept["small"].dtype, kept["large"].dtype) == (torch.float16, torch.bfloat16)
    assert to_storage(features, "float32")["large"].dtype == torch.float32
    with pytest.raises(UserError, match="`storage` is 'float16', but large reaches 7e"):
        to_storage(features, "float16")


def test_an_image_that_is_not_a_number_stops_no_other(extractor_of):
    extractor = extractor_of()
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    broken = images.clone()
    broken[1] = torch.nan
    (found,) = extract(extractor, [Batch(broken, keys=[1, 2, 3])])
    assert found.rows == (0, 2)
    assert "NaN" in found.failed[1]
    (good,) = extract(extractor, [Batch(images, keys=[1, 2, 3])])
    torch.testing.assert_close(found.features[FINE], good.features[FINE][[0, 2]], atol=1e-2, rtol=1e-2)
    with pytest.raises(NonFiniteError):
        next(extract(extractor, [Batch(broken[1:2])]))


def test_settings_that_cannot_be_stored_are_refused(extractor_of, images):
    with pytest.raises(UserError, match="features are stored raw"):
        plan_features(extractor_of(normalise="l2"), images)
    with pytest.raises(UserError, match="the features of one image take 10,240 bytes, and a shard holds 5,000"):
        plan_features(extractor_of(), images, shard_bytes=5000)
    with pytest.raises(UserError, match="`batch_size` is 0"):
        plan_features(extractor_of(), images, batch_size=0)
