"""All metrics of two image sets: the numbers, what they cost, and what an interruption costs."""

import json
import math
import re
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from diffcore import Runtime
from diffcore.cli import main
from diffcore.cli.commands.app import app
from diffcore.data import ImageSource, list_images, load_prompts
from diffcore.errors import UserError
from diffcore.metrics import (
    compare_features,
    embed,
    extrapolate,
    feature_extractor,
    frechet_distance_from_features,
    frechet_estimate,
    kernel_distance,
    nearest_training_images,
    page,
    precision_recall,
    prepare,
    real_floor,
)
from diffcore.metrics.compare import nearest_real
from diffcore.metrics.embed import Reading, embed_images
from diffcore.metrics.features import FeatureExtractor
from diffcore.metrics.preprocess import Preprocessing
from diffcore.metrics.prompt_fit import places_of_prompts
from diffcore.metrics.random_network import RandomNetwork
from diffcore.run import Run
from diffcore.stats import covariance
from diffcore.testing import tiny

CPU = Runtime(device="cpu")
READING = Reading(torch.device("cpu"), batch_size=16)
SLICE, COUNT = 128, 148


def write_images(folder: Path, count: int, *, bright: int = 0, seed: int = 0, mixed: bool = False) -> Path:
    """Blotches of 20x16; mixed, every third is 16x16."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for number in range(count):
        blotches = generator.integers(0, 200, (4, 4, 3), dtype=np.uint8) + bright
        size = (16, 16) if mixed and number % 3 == 0 else (20, 16)
        Image.fromarray(blotches.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC).save(
            folder / f"{number:04d}.png"
        )
    return folder


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(embed, "SLICE", SLICE)
    monkeypatch.setattr(embed, "_CHUNK", 48)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("images")
    real = write_images(root / "real", COUNT, mixed=True)
    (real / "broken.png").write_bytes(b"\x89PNG nothing")
    return real, write_images(root / "fake", 40, bright=30, seed=1)


def embedded(folder: Path, run: Run, *names: str):
    return embed_images(list_images(folder), "0" * 64, [feature_extractor(name, CPU) for name in names], run, READING)


def opened(folder: Path) -> Run:
    return Run.open(folder, command="diffcore test", config={}, inputs={})


# --- features ---------------------------------------------------------------------------------------------------------


def test_each_image_is_decoded_once_and_each_network_sees_it_once(folders, tmp_path, monkeypatch):
    decoded, rows = [], []
    decode = ImageSource.decode

    def counted(self, index, **options):
        decoded.append(index)
        return decode(self, index, **options)

    monkeypatch.setattr(ImageSource, "decode", counted)
    extractors = [feature_extractor(f"random:{seed}", CPU) for seed in (0, 1)]
    for extractor in extractors:
        extractor.network.register_forward_pre_hook(lambda _, x: rows.append(len(x[0])))
    with opened(tmp_path / "run") as run:
        embed_images(list_images(folders[0]), "0" * 64, extractors, run, READING)
        assert sorted(decoded) == list(range(COUNT + 1))
        assert sum(rows) == 2 * COUNT
        assert max(rows) == 16
        embed_images(list_images(folders[0]), "0" * 64, extractors, run, READING)  # everything is there
        assert len(decoded) == COUNT + 1
        embed_images(list_images(folders[0]), "1" * 64, extractors[:1], run, READING)  # another image set
        assert len(decoded) == 2 * (COUNT + 1)


def test_features_are_those_of_each_image_alone(folders, tmp_path):
    keeps_proportions = Preprocessing(24, None, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    oblong = FeatureExtractor("oblong", "1" * 64, keeps_proportions, RandomNetwork(1), lambda network, x: network(x))
    source = list_images(folders[0])
    for extractor in (feature_extractor("random:3", CPU), oblong):
        with opened(tmp_path / extractor.name[:6]) as run:
            found = embed_images(source, "0" * 64, [extractor], run, READING)
        assert len(found.names) == COUNT
        assert found.skipped == (("broken.png", "is not a PNG, JPEG, WebP, BMP or TIFF image"),)
        for row in (0, 1, 2, SLICE - 1, SLICE, COUNT - 1):
            assert source.names[found.indices[row]] == found.names[row]
            expected = extractor(source.read(found.indices[row])[None].float() / 255)[0]
            torch.testing.assert_close(found.features[extractor.name][row], expected, atol=1e-5, rtol=1e-5)


def test_images_that_a_network_cannot_stand_are_named(folders, tmp_path):
    extractor = feature_extractor("random:0", CPU)
    extractor.network.register_forward_hook(lambda _, x, y: torch.full_like(y, torch.nan))
    with opened(tmp_path / "run") as run, pytest.raises(UserError, match=r"NaN or infinity of 40 images, 0000\.png"):
        embed_images(list_images(folders[1]), "0" * 64, [extractor], run, Reading(torch.device("cpu"), 16))


def test_random_networks_are_the_same_everywhere_and_leave_torchs_stream_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = feature_extractor("random:0", CPU)
    assert torch.equal(torch.rand(3), expected)
    assert first.sha256 == "1efe3a2ee5b0f861e4bf3b833d770869f13522e72120dd7e99977a13e5a88a31"
    assert feature_extractor("random:1", CPU).sha256 != first.sha256
    for name in ("random:", "random:x", "random:-1", "random:1_0", "random:" + "9" * 30):
        with pytest.raises(UserError, match="is no feature extractor"):
            feature_extractor(name, CPU)


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m", "d"), [(60, 45, 6), (12, 15, 30)], ids=["many rows", "few rows"])
def test_the_error_of_a_frechet_distance_is_the_jackknifes(n, m, d):
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    real = torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix
    fake = 0.5 + torch.randn(m, d, generator=generator, dtype=torch.float64)
    variance, sides = 0.0, []
    for rows, distance in (
        (real, lambda rest: frechet_distance_from_features(rest, fake)),
        (fake, lambda rest: frechet_distance_from_features(real, rest)),
    ):
        left_out = torch.stack([distance(torch.cat([rows[:i], rows[i + 1 :]])) for i in range(len(rows))])
        sides.append((len(rows) - 1) / len(rows) * float((left_out - left_out.mean()).square().sum()))
        variance += sides[-1]
    found = frechet_estimate(real, fake)
    assert found.value == pytest.approx(float(frechet_distance_from_features(real, fake)), rel=1e-12)
    assert found.n == min(n, m)
    # Leaving a row out moves the covariance a little further than a derivative reaches.
    assert found.standard_error == pytest.approx(math.sqrt(variance), rel=0.1)
    if n > d:
        of_fakes = frechet_estimate(covariance(real), fake)
        assert of_fakes.standard_error == pytest.approx(math.sqrt(sides[1]), rel=0.1)
        assert of_fakes.value == pytest.approx(found.value, rel=1e-9)


def test_numbers_are_those_of_each_metric_by_itself():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(80, 8, generator=generator)
    fake = 0.3 + 0.9 * torch.randn(60, 8, generator=generator)
    found = {m.metric: m for m in compare_features(real, fake, "x", noise=torch.eye(8))}
    scores = precision_recall(real, fake)
    broken = functional.normalize(fake, dim=1).amax(1) > 0.45
    floor, limit, kernel = real_floor(real, 60), extrapolate(real, fake), kernel_distance(real, fake)
    expected = {
        "Fréchet distance": float(frechet_distance_from_features(real, fake)),
        "Fréchet distance, extrapolated": limit.value,
        "Fréchet distance, real against real": floor.value,
        "kernel distance": kernel.value,
        **{name: float(value) for name, value in scores._asdict().items()},
        "share of copies": float(((nearest_training_images(real, fake).cosine[:, 0] > 0.5) & ~broken).double().mean()),
        "share that looks like noise": float(broken.double().mean()),
    }
    assert {name: m.value for name, m in found.items()} == pytest.approx(expected, rel=1e-12)
    assert all(m.low < m.value < m.high for m in found.values() if 0 < m.value < 1 or m.metric.startswith("Fr"))
    kid = found["kernel distance"]
    assert kid.high - kid.low == pytest.approx(2 * 1.959964 * kernel.standard_error)
    assert found["Fréchet distance, real against real"].n == floor.n == 40
    # Wilson's interval by its definition: the shares whose score test is just not rejected.
    precision = found["precision"]
    for bound in (precision.low, precision.high):
        assert abs(precision.value - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / 60), rel=1e-6)
    from_moments = compare_features(covariance(real), fake, "x")
    assert [m.metric for m in from_moments] == ["Fréchet distance", "Fréchet distance, extrapolated"]
    assert from_moments[0].value == pytest.approx(expected["Fréchet distance"], rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("level", "spread"), [(0.0, 1.0), (50.0, 30.0), (1.0, 1e-2)])
def test_numbers_of_half_precision_are_those_of_single(dtype, level, spread):
    generator = torch.Generator().manual_seed(0)
    real, fake = ((level + spread * torch.randn(60, 64, generator=generator)).to(dtype) for _ in range(2))
    half, single = (
        compare_features(x, y, "x", noise=torch.eye(64)) for x, y in ((real, fake), (real.float(), fake.float()))
    )
    assert half == single
    assert kernel_distance(real, fake.float()) == kernel_distance(real.float(), fake.float())
    assert torch.equal(nearest_real(real, fake, 3)[0], nearest_real(real.float(), fake.float(), 3)[0])


# --- the command ------------------------------------------------------------------------------------------------------


def run(*tokens: object) -> int:
    return main(app, [str(token) for token in tokens])


def measured(capsys: pytest.CaptureFixture[str], *tokens: object) -> dict:
    capsys.readouterr()
    assert run("metrics", *tokens, "--json") == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def contents(folder: Path) -> dict[str, bytes]:
    """What a run wrote, without what the clock wrote."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in ("run.json", "run.lock")]
    found = {
        str(p.relative_to(folder)): p.read_bytes() for p in files if p.parent.name != "parts" or p.suffix != ".json"
    }
    found["report.html"] = re.sub(rb"20\d\d-\d\d-\d\dT[\d:+]+", b"", found["report.html"])
    return found


class Addresses(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]


def test_command_measures_writes_and_goes_on_where_it_was_killed(folders, tmp_path, capsys, monkeypatch):
    real, fake = folders
    whole = measured(capsys, real, fake, "--out", tmp_path / "whole")
    assert (whole["real_images"], whole["real_skipped"], whole["fake_images"]) == (COUNT, 1, 40)
    values = {row["metric"]: row["value"] for row in whole["metrics"]}
    assert values["Fréchet distance"] > 5 * values["Fréchet distance, real against real"] > 0
    assert {row["features"] for row in whole["metrics"]} == {"random:0"} == set(whole["features"])

    save, saved = Run.save, []

    def killed(self, key, tensors, **meta):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(key)
        return save(self, key, tensors, **meta)

    decode, decoded, seen = ImageSource.decode, [], []

    def counted(self, index, **options):
        decoded.append((self.path.name, index))
        return decode(self, index, **options)

    monkeypatch.setattr(Run, "save", killed)
    assert run("metrics", real, fake, "--out", tmp_path / "killed") == 130
    monkeypatch.setattr(Run, "save", save)
    monkeypatch.setattr(ImageSource, "decode", counted)
    monkeypatch.setattr(prepare, "write_page", lambda *a: seen.extend(decoded) or page.write_page(*a))
    assert measured(capsys, real, fake, "--out", tmp_path / "killed") == whole
    assert sorted(seen) == [("fake", index) for index in range(40)]  # the real ones were finished before
    monkeypatch.setattr(ImageSource, "decode", decode)
    first, second = contents(tmp_path / "whole"), contents(tmp_path / "killed")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    assert len([name for name in first if name.startswith("parts/")]) == 3

    html = (tmp_path / "whole" / "report.html").read_text("utf-8")
    parsed = Addresses(html)
    assert parsed.tags.isdisjoint({"script", "link", "iframe", "object"})
    assert all(address.startswith(("data:", "#")) for address in parsed.found)
    for told in ("Nearest real images", "not comparable with published numbers", "broken.png"):
        assert told in html
    for name in [*first]:
        assert str(tmp_path).encode() not in first[name], name
    table = (tmp_path / "whole" / "tables" / "metrics.csv").read_text("utf-8")
    assert table.startswith("features,metric,value,low,high,n")
    assert len(table.splitlines()) == 1 + len(whole["metrics"])

    # The same again does nothing, other settings are refused, a zip of the same images gives the same numbers.
    monkeypatch.setattr(ImageSource, "decode", counted)
    decoded.clear()
    assert measured(capsys, real, fake, "--out", tmp_path / "whole") == whole
    assert not decoded
    assert run("metrics", real, fake, "--features", "random:1", "--out", tmp_path / "whole") == 2
    with zipfile.ZipFile(tmp_path / "fake.zip", "w") as archive:
        for path in sorted(fake.iterdir()):
            archive.write(path, path.name)
    zipped = measured(capsys, real, tmp_path / "fake.zip", "--out", tmp_path / "zipped")
    assert zipped["metrics"] == whole["metrics"]


def test_command_refuses_before_it_writes(folders, tmp_path, capsys):
    real, fake = folders
    out = tmp_path / "out"
    write_images(tmp_path / "few", 9)
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "stats.npz", mu=np.zeros(7), sigma=np.eye(7))
    (tmp_path / "p.txt").write_text("a\nb\nc\n")
    cases = [
        ([real, tmp_path / "none"], "does not exist"),
        ([real, tmp_path / "empty"], "is empty"),
        ([real, fake, "--features", "inception"], "is no feature extractor"),
        ([real, fake, "--features", "inception:nothing.pt"], "there is no nothing.pt"),
        ([real, fake, "--batch-size", "0"], "--batch-size is 0"),
        ([real, fake, "--max-pixels", "0"], "--max-pixels is 0"),
        ([real, fake, "--devices", "2"], "runs in one process"),
        ([real, fake, "--dtype", "bfloat16"], "always float32"),
        ([real, fake, "--clip", tmp_path], "--prompts"),
        ([real, fake, "--prompts", tmp_path / "p.txt"], "needs a CLIP"),
        ([tmp_path / "stats.npz", fake, "--features", "random:0", "random:1"], "statistics of one network"),
    ]
    for tokens, message in cases:
        assert run("metrics", *tokens, "--out", out) == 2
        assert message in " ".join(capsys.readouterr().err.split())
        assert not out.exists()
    assert run("metrics", real, fake, "--out", fake / "run") == 2
    assert "which is read; give another" in " ".join(capsys.readouterr().err.split())
    assert not (fake / "run").exists()
    later = [
        ([real, fake, "--max-pixels", "256"], "has 20 x 16 pixels; the limit is 256 (--max-pixels)"),
        ([real, fake, "--strict"], "broken.png is not a PNG"),
        ([real, tmp_path / "few"], "the fake side has 9 readable images"),
        ([tmp_path / "stats.npz", fake], "the statistics are of 7 features, random:0 has 224"),
    ]
    for number, (tokens, message) in enumerate(later):
        assert run("metrics", *tokens, "--out", tmp_path / f"later{number}") == 2
        assert message in " ".join(capsys.readouterr().err.split())
    planned = measured(capsys, real, fake, "--dry-run", "--out", out)
    assert (planned["real_files"], planned["fake_files"], planned["parts"]) == (COUNT + 1, 40, 3)
    assert not out.exists()


def test_statistics_of_others_stand_for_real_images(folders, tmp_path, capsys):
    real, fake = folders
    with opened(tmp_path / "features") as features:
        rows = embedded(real, features, "random:0").features["random:0"]
    moments = covariance(rows)
    np.savez(tmp_path / "stats.npz", mu=moments.mean.numpy(), sigma=moments.cov.numpy())
    with_images = measured(capsys, real, fake, "--out", tmp_path / "a")
    found = measured(capsys, tmp_path / "stats.npz", fake, "--out", tmp_path / "b")
    values = [{row["metric"]: row["value"] for row in told["metrics"]} for told in (with_images, found)]
    assert values[1] == pytest.approx({name: values[0][name] for name in values[1]}, rel=1e-6)
    assert len(values[1]) == 2
    assert "real_images" not in found


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> tuple[Path, object]:
    import transformers

    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**small, "image_size": 16, "patch_size": 8}
    text = {**small, "vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=12)
    model = tiny.seeded(lambda: transformers.CLIPModel(config), 0)
    folder = tmp_path_factory.mktemp("models") / "tiny clip"
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    settings = {"size": {"shortest_edge": 16}, "crop_size": 16, "resample": 3}
    means = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps({**settings, **means}))
    return folder, model


def test_clip_score_is_that_of_transformers(folders, clip, tmp_path, capsys):
    folder, model = clip
    texts = [f"prompt {number} <script>alert(1)</script>" for number in range(18)] + ["=x" + "y " * 200, "[/b]"]
    (tmp_path / "prompts.csv").write_text("id;Caption\n" + "".join(f"{i};{t}\n" for i, t in enumerate(texts)))
    tokens = [*folders, "--prompts", tmp_path / "prompts.csv", "--clip", folder, "--out", tmp_path / "run"]
    found = measured(capsys, *tokens)
    row = next(row for row in found["metrics"] if row["metric"] == "CLIP score")
    assert row["features"] == "clip:tiny clip"
    source, tokenizer = list_images(folders[1]), tiny.tokenizer()
    extractor = feature_extractor(f"clip:{folder}", CPU)
    scores = []
    for index in range(40):  # two images per prompt
        ids = tokenizer([texts[index // 2]], truncation=True, max_length=77, return_tensors="pt")
        pixels = extractor.preprocessing(source.read(index)[None].float() / 255)
        output = model(input_ids=ids.input_ids, attention_mask=ids.attention_mask, pixel_values=pixels)
        scores.append(max(100 * float(output.image_embeds @ output.text_embeds.T), 0.0))
    assert row["value"] == pytest.approx(float(np.mean(scores)), rel=1e-4)
    assert row["n"] == 40
    images = (tmp_path / "run" / "tables" / "images.jsonl").read_text("utf-8").splitlines()
    told = [json.loads(line) for line in images]
    assert [image["clip_score"] for image in told] == pytest.approx(scores, abs=1e-2)
    assert [image["line"] for image in told[34:]] == [19, 19, 20, 20, 21, 21]
    assert [image["truncated"] for image in told[34:]] == [False, False, True, True, False, False]
    assert told[37]["lost"].startswith("y")
    html = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "2 of 40 images have a prompt that CLIP read in part only" in html
    assert "script" not in Addresses(html).tags
    for path in (tmp_path / "run").rglob("*.*"):
        assert str(folder.parent).encode() not in path.read_bytes(), path
    assert "clip: " in (tmp_path / "run" / "config.yaml").read_text("utf-8")
    # Judged by one of the features, no network is run twice; nothing but the rows of the table differs.
    tokens[4:] = ["--features", f"clip:{folder}", "--out", tmp_path / "both"]
    both = measured(capsys, *tokens)
    assert both["metrics"][-1] == row
    assert len(list((tmp_path / "both" / "parts").glob("*.json"))) == 3


def test_prompts_find_their_images(tmp_path):
    def prompts(name: str, text: str):
        (tmp_path / name).write_text(text)
        return load_prompts(tmp_path / name)

    names = ["a.png", "b.png", "c.png", "d.png"]
    assert places_of_prompts(prompts("1.txt", "x\ny\n"), names) == (0, 0, 1, 1)
    assert places_of_prompts(prompts("1.csv", "file_name,text\nc.png,x\na.png,y\n"), names) == (1, -1, 0, -1)
    refused = {
        "2.txt": ("x\ny\nz\n", "4 images do not go with the 3 prompts"),
        "3.txt": ("x\ny\tz\nu\n", "line 2 holds the control character"),
        "2.csv": ("file_name,text\ne.png,x\n", "names none of the images"),
    }
    for name, (text, message) in refused.items():
        with pytest.raises(UserError, match=message):
            places_of_prompts(prompts(name, text), names)
