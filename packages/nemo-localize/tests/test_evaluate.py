import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from diffcore.errors import UserError
from diffcore.metrics import FeatureExtractor, feature_extractor, pairwise_ssim
from diffcore.metrics.frechet import frechet_distance_from_features
from diffcore.metrics.kid import kernel_distance
from diffcore.metrics.preprocess import SSCD, Preprocessing
from diffcore.metrics.prompt_fit import ClipText
from diffcore.models.prompts import TextTower
from diffcore.runtime import Runtime
from nemo_localize.evaluate import Judges, evaluate, kinds_of
from nemo_localize.likeness import likeness

PROMPTS = ["first", "second", "third"]
PLAIN = Preprocessing((8, 8), None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


class Flat(nn.Module):
    """Features that are the image itself; remembers the size it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.seen: tuple[int, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        self.seen = tuple(x.shape[-2:])
        return functional.adaptive_avg_pool2d(x, 4).flatten(1)


def extractor(name: str, preprocessing: Preprocessing) -> FeatureExtractor:
    return FeatureExtractor(name, "0" * 64, preprocessing, Flat(), lambda network, x: network(x))


class ToldText(ClipText):
    """A text side whose embeddings are given."""

    def __call__(self, prompts) -> Tensor:
        return torch.eye(48)[[PROMPTS.index(prompt) for prompt in prompts]]


def smooth(*shape: int, seed: int) -> Tensor:
    coarse = torch.rand(*shape, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return functional.interpolate(coarse.flatten(0, -4), size=(16, 16), mode="bilinear").unflatten(0, shape)


@pytest.fixture(scope="module")
def originals() -> dict[str, Tensor]:
    return dict(zip(PROMPTS[:2], smooth(2, 1, seed=0), strict=True))


@pytest.fixture(scope="module")
def images(originals) -> dict[str, Tensor]:
    """The unedited model copies the first image, not the second; the edited one copies nothing."""
    copied = smooth(3, 4, seed=1)
    copied[0] = originals["first"][0] + 0.01 * smooth(4, seed=2)
    return {"none": copied, "neurons": smooth(3, 4, seed=3)}


def by(rows, **wanted):
    (row,) = (row for row in rows if all(row[key] == value for key, value in wanted.items()))
    return row


def test_every_measure_is_its_definition_on_each_caption(images, originals):
    found = evaluate(PROMPTS, images, originals=originals)
    own, before = images["neurons"][0], images["none"][0]

    def ssim(a: Tensor, b: Tensor) -> float:
        return float(pairwise_ssim(torch.stack([a, b])[None], data_range=1.0))

    row = by(found.caption_rows(), prompt="first", mitigation="neurons")
    towards = torch.tensor([ssim(image, originals["first"][0]) for image in own])
    assert row["SSIM_orig"] == pytest.approx(float((towards.sort().values[1:3]).mean()), abs=1e-5)
    assert row["SSIM_orig, max"] == pytest.approx(float(towards.max()), abs=1e-5)
    same = torch.tensor([ssim(a, b) for a, b in zip(own, before, strict=True)]).sort().values
    assert row["SSIM_gen"] == pytest.approx(float(same[1:3].mean()), abs=1e-5)
    pairs = torch.tensor([ssim(own[i], own[j]) for i in range(4) for j in range(i)]).sort().values
    assert row["D_SSIM"] == pytest.approx(float(pairs[2:4].mean()), abs=1e-5)
    assert by(found.caption_rows(), prompt="first", mitigation="none")["SSIM_gen"] == pytest.approx(1, abs=1e-5)
    assert by(found.caption_rows(), prompt="first", mitigation="none")["share of copies"] == 1


def test_captions_are_split_by_what_the_unedited_model_copies(images, originals):
    found = evaluate(PROMPTS, images, originals=originals)
    kinds = {row["prompt"]: row["kind"] for row in found.caption_rows()}
    assert kinds == {"first": "verbatim", "second": "template", "third": "no training image"}
    assert [row["captions"] for row in found.rows() if row["mitigation"] == "none"] == ["all", "verbatim", "template"]
    assert by(found.rows(), mitigation="neurons", captions="all")["n"] == 3
    # Over captions: median and median absolute deviation.
    values = sorted(row["SSIM_gen"] for row in found.caption_rows() if row["mitigation"] == "neurons")
    row = by(found.rows(), mitigation="neurons", captions="all")
    assert row["SSIM_gen"] == pytest.approx(values[1])
    assert row["SSIM_gen, mad"] == pytest.approx(sorted(abs(value - values[1]) for value in values)[1])


def test_a_column_type_has_the_word(images, originals):
    kinds = kinds_of(PROMPTS, ["TM", "vm", ""])
    assert kinds == {"first": "template", "second": "verbatim"}
    found = evaluate(PROMPTS, images, originals=originals, kinds=kinds)
    assert {row["prompt"]: row["kind"] for row in found.caption_rows()} == {**kinds, "third": "no training image"}
    assert any("as they were given" in note for note in found.notes)
    assert kinds_of(PROMPTS, ["MV", "TV", "RV"]) == dict(
        zip(PROMPTS, ("verbatim", "template", "verbatim"), strict=True)
    )
    assert kinds_of(PROMPTS, ["VM", "a photo", ""]) is None  # a column of something else
    assert kinds_of(PROMPTS, ["", "", ""]) is None


def test_published_medians_are_the_lower_of_two(images):
    ours, theirs = (evaluate(PROMPTS[:2], {w: p[:2] for w, p in images.items()}, published=r) for r in (False, True))
    own, before = images["neurons"][0], images["none"][0]
    values = pairwise_ssim(torch.stack([own, before], 1), data_range=1.0)[:, 0].sort().values
    row = by(theirs.caption_rows(), prompt="first", mitigation="neurons")
    assert row["SSIM_gen"] == pytest.approx(float(values[1]), abs=1e-5)
    each = sorted(row["SSIM_gen"] for row in theirs.caption_rows() if row["mitigation"] == "neurons")
    table = by(theirs.rows(), mitigation="neurons", captions="all")
    assert (table["SSIM_gen"], table["SSIM_gen, mad"]) == (each[0], 0)
    assert by(ours.rows(), mitigation="neurons", captions="all")["SSIM_gen, mad"] > 0
    assert any("lower of the two" in note for note in theirs.notes)


def test_what_stands_in_is_named_in_every_row(images):
    found = evaluate(PROMPTS, images)
    assert all("stands in for SSCD" in row["measured in"] for row in found.rows())
    assert any("A_CLIP was not measured" in note for note in found.notes)
    assert not any("orig" in key for row in found.rows() for key in row)
    assert not any(key.startswith(("SSCD", "D_SSCD")) for row in found.rows() for key in row)


def test_images_of_noise_are_like_nothing_and_are_counted(images, originals, monkeypatch):
    # Whatever is bright counts as noise here: which features noise has is the network's own.
    monkeypatch.setattr("nemo_localize.likeness.looks_like_noise", lambda rows, noise: torch.arange(len(rows)) == 1)
    found = evaluate(PROMPTS, images, originals=originals, judges=Judges(copies=extractor("sscd:model.pt", SSCD)))
    row = by(found.caption_rows(), prompt="first", mitigation="none")
    assert (row["share of noise"], row["share of copies"]) == (0.25, 0.75)
    assert "3 captions have images of noise under 'none': they are like nothing, and no copies" in found.notes
    judge = likeness(extractor("sscd:model.pt", SSCD))
    towards = judge.towards(originals["first"], originals["first"].expand(3, -1, -1, -1))
    assert towards.tolist() == pytest.approx([1, 0, 1], abs=1e-5)
    assert not likeness().is_noise(images["none"][0]).any()


def test_sscd_sees_images_as_the_paper_prepares_them(images, originals, monkeypatch):
    monkeypatch.setattr(
        "nemo_localize.likeness.looks_like_noise", lambda rows, noise: torch.zeros(len(rows), dtype=torch.bool)
    )
    sscd = extractor("sscd:model.pt", SSCD)
    found = evaluate(PROMPTS, images, originals=originals, judges=Judges(copies=sscd))
    assert sscd.network.seen == (320, 320)
    row = by(found.caption_rows(), prompt="second", mitigation="neurons")
    prepared = SSCD.__class__((320, 320), None, SSCD.mean, SSCD.std, SSCD.filter)
    rows = functional.normalize(sscd.embed(prepared(images["neurons"][1])), dim=1)
    other = functional.normalize(sscd.embed(prepared(originals["second"])), dim=1)
    cosines = (rows @ other.T)[:, 0].sort().values
    assert row["SSCD_orig"] == pytest.approx(float(cosines[1:3].mean()), abs=1e-5)
    assert likeness(extractor("dino:x", PLAIN)).name == "cosine"
    seen: list[str] = []
    elsewhere = extractor("sscd:x", SSCD).to("meta")  # as on an accelerator: images come from the CPU
    elsewhere._read = lambda network, x: seen.append(x.device.type) or torch.ones(len(x), 2)
    assert likeness(elsewhere).between(torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)).device.type == "cpu"
    assert set(seen) == {"meta"}


def test_captions_are_judged_by_cosine(images):
    clip = ToldText(extractor("clip:x", PLAIN), TextTower(None, nn.Identity(), 1), "0")
    found = evaluate(PROMPTS, images, judges=Judges(clip=clip))
    features = functional.normalize(clip.extractor(images["neurons"][1]), dim=1)
    expected = features[:, 1].sort().values[1:3].mean()
    assert by(found.caption_rows(), prompt="second", mitigation="neurons")["A_CLIP"] == pytest.approx(
        float(expected), abs=1e-5
    )


def test_distances_are_diffcores_and_say_what_they_are_from(images):
    judge = feature_extractor("random:0", Runtime(device="cpu"))
    inception = extractor("inception:x", PLAIN)
    ordinary = {"none": smooth(12, seed=5), "neurons": smooth(12, seed=6)}
    real = smooth(14, seed=7)
    found = evaluate(PROMPTS, images, ordinary=ordinary, real=real, judges=Judges(quality=(inception, judge)))
    fid = by(found.quality_rows(), mitigation="neurons", metric="FID")
    expected = frechet_distance_from_features(inception(real), inception(ordinary["neurons"]))
    assert fid["value"] == pytest.approx(float(expected), rel=1e-4)
    kid = by(found.quality_rows(), mitigation="neurons", metric="KID")
    assert kid["value"] == pytest.approx(
        kernel_distance(inception(real), inception(ordinary["neurons"])).value, rel=1e-4
    )
    assert by(found.quality_rows(), mitigation="none", metric="Fréchet distance")["features"] == "random:0"
    assert any("random:0 stands in for Inception" in note for note in found.notes)
    alone = evaluate(PROMPTS, images, ordinary=ordinary, judges=Judges(quality=(judge,)))
    assert {row["mitigation"] for row in alone.quality_rows()} == {"neurons"}
    assert any("unedited model's images" in note for note in alone.notes)


def test_images_must_be_of_the_same_captions(images):
    with pytest.raises(UserError, match="unedited"):
        evaluate(PROMPTS, {"neurons": images["neurons"]})
    with pytest.raises(ValueError, match="images of 'neurons'"):
        evaluate(PROMPTS, {**images, "neurons": images["neurons"][:2]})
