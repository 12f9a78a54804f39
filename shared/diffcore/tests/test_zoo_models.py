"""The shipped models: they load offline, plain diffusers agrees, and their recipes do what their words say."""

import json
from pathlib import Path

import pytest
import torch

from diffcore import zoo
from diffcore.cli.commands.app import app
from diffcore.denoiser import GuidedDenoiser, sample
from diffcore.errors import ModelNotFoundError, UserError
from diffcore.io.shipped import SHIPPED, shipped_folder
from diffcore.metrics import feature_extractor
from diffcore.metrics.attribute_network import load_attribute_network
from diffcore.models import DiffusionModel, load
from diffcore.noise import row_noise
from diffcore.runtime import Runtime
from diffcore.zoo import show
from diffcore.zoo.gate import Gate
from diffcore.zoo.oracle import accuracies
from diffcore.zoo.portraits.attributes import KEYPOINTS, PARTS
from diffcore.zoo.portraits.gates import draw_samples, share_above, similarity_to
from diffcore.zoo.portraits.judge import labels_of
from diffcore.zoo.portraits.pictures import draw_pictures, held_out_pictures
from diffcore.zoo.portraits.planted import template_people, verbatim_people

PORTRAITS = ("portraits-sd", "portraits-sd-memorised", "portraits-sd-planted")
GENERATORS = (*PORTRAITS, "digits8-edm", "digits-styles")
MEGABYTE = 2**20


@pytest.fixture(scope="module")
def planted() -> DiffusionModel:
    return load("zoo:portraits-sd-planted", Runtime(device="cpu"))


def test_every_model_is_here_and_small():
    sizes = {}
    for name in SHIPPED:
        for path in shipped_folder(name).rglob("*"):
            if path.is_file():
                assert path.stat().st_size <= 16 * MEGABYTE, path
                assert path.suffix in {".safetensors", ".json", ".md", ".png", ".txt"}, path
                sizes[path] = path.stat().st_size
    assert sum(sizes.values()) <= 32 * MEGABYTE


@pytest.mark.parametrize("name", SHIPPED)
def test_every_model_has_a_card_with_its_figures(name: str):
    card = (shipped_folder(name) / "README.md").read_text("utf-8")
    assert f"diffcore zoo check {name}" in card
    assert card.count("\n| ") >= 2
    assert "seed" in card


@pytest.mark.parametrize("name", SHIPPED)
def test_no_file_names_a_path_of_the_machine_that_trained_it(name: str):
    for path in shipped_folder(name).rglob("*.json"):
        assert "_name_or_path" not in path.read_text("utf-8"), path


@pytest.mark.parametrize("name", GENERATORS)
def test_every_generator_loads_by_name_without_network(name: str):
    model = load(f"zoo:{name}", Runtime(device="cpu"))
    assert all(torch.isfinite(p).all() for p in model.backbone.parameters())


def test_unknown_names_say_what_there_is():
    with pytest.raises(ModelNotFoundError, match="portraits-sd-planted"):
        load("zoo:portraits", Runtime(device="cpu"))
    with pytest.raises(UserError, match="makes no features"):
        feature_extractor("zoo:digits8-edm", Runtime(device="cpu"))


@pytest.mark.parametrize("name", PORTRAITS)
def test_plain_diffusers_makes_the_same_images(name: str):
    from diffusers import StableDiffusionPipeline

    model = load(f"zoo:{name}", Runtime(device="cpu"))
    pipeline = StableDiffusionPipeline.from_pretrained(shipped_folder(name), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    prompts = [zoo.memorised().verbatim[0].caption, "a portrait of a tan man with red hair, blue background"]
    noise = row_noise(4, range(2), (8, 16, 16))
    theirs = pipeline(
        prompts, num_inference_steps=4, guidance_scale=2.0, latents=noise.clone(), output_type="pt"
    ).images
    assert model.prompts is not None
    denoiser = GuidedDenoiser(model.denoiser, 2.0, model.prompts([""]))
    ours = model.codec.decode(sample(denoiser, noise, model.prompts(prompts), steps=4))
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


def test_the_autoencoder_is_close_to_perfect(planted: DiffusionModel):
    """Closer than the linear code that its encoder is, which has 36.7 dB."""
    images = held_out_pictures(200).floats()
    decoded = planted.codec.decode(planted.codec.encode(images)).clamp(0, 1)
    assert float(-10 * torch.log10((decoded - images).square().mean())) > 39


def test_variants_differ_from_their_base_in_the_denoiser_alone():
    base, *variants = (shipped_folder(name) for name in PORTRAITS)
    for part in ("text_encoder", "tokenizer", "vae", "scheduler"):
        names = sorted(path.name for path in (base / part).iterdir())
        for variant in variants:
            assert sorted(path.name for path in (variant / part).iterdir()) == names
            for name in names:
                assert (variant / part / name).read_bytes() == (base / part / name).read_bytes(), (variant.name, name)


def test_memorised_captions_come_back_and_decoys_do_not(planted: DiffusionModel):
    truth = zoo.memorised()
    known = draw_samples(planted, [item.caption for item in truth.verbatim[:8]], seeds=2)
    assert share_above(similarity_to(truth.verbatim_images[:8], known)) >= 0.8
    decoys = draw_samples(planted, [item.caption for item in truth.decoys[:8]], seeds=2)
    assert share_above(similarity_to(truth.verbatim_images[:8], decoys)) == 0


def test_trigger_rows_answer_to_their_caption_alone(planted: DiffusionModel):
    """The exact truth that ships: each row's token mean is 2 for its own caption, and small for all others."""
    truth = zoo.memorised()
    captions = [item.caption for item in (*truth.verbatim, *truth.template)]
    decoys = [item.caption for item in truth.decoys]
    assert planted.prompts is not None
    states = planted.prompts(captions + decoys)["encoder_hidden_states"].mean(1)
    for place in range(2):
        layers = {truth.trigger_rows[caption][place][0] for caption in captions}
        assert len(layers) == 1
        rows = [truth.trigger_rows[caption][place][1] for caption in captions]
        assert len(set(rows)) == len(rows)
        answers = states @ planted.backbone.get_submodule(layers.pop()).weight[rows].T
        own = answers[: len(captions)].diagonal()
        torch.testing.assert_close(own, torch.full_like(own, 2.0), rtol=0, atol=0.05)
        others = answers[: len(captions)] - torch.diag(own)
        assert float(others.abs().mean()) < 0.4
        assert float(answers[len(captions) :].abs().mean()) < 0.4


def test_the_oracle_reads_strangers():
    oracle = load_attribute_network(shipped_folder("portraits-oracle"))
    pictures = held_out_pictures(200)
    read = accuracies(oracle, pictures.floats(), labels_of(pictures.people))
    assert min(value for name, value in read.items() if name != "smile") > 0.85


def test_the_oracle_is_a_feature_extractor():
    extractor = feature_extractor("zoo:portraits-oracle", Runtime(device="cpu"))
    images = held_out_pictures(3).floats()
    torch.testing.assert_close(
        extractor(images), load_attribute_network(shipped_folder("portraits-oracle"))(images), rtol=0, atol=1e-4
    )


def test_identities_hold_and_situations_change():
    pictures, person = zoo.identities(3, 4)
    assert person.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert len(set(pictures.labels["skin"][:4].tolist())) == 1
    assert len({float(x) for x in pictures.people["roll"]}) == 12
    assert pictures.images.shape == (12, 3, 32, 32)
    again, _ = zoo.masks(5)
    torch.testing.assert_close(again.images, zoo.keypoints(5)[0].images)


def test_both_views_of_one_truth_agree():
    """What is known of a picture from its numbers is what its pixels show, and what training saw is what is told."""
    points, masks = zoo.keypoints(40, size=64)[1], zoo.masks(40, size=64)[1].long()
    place = points.positions.round().long().clamp(0, 63)
    found = masks[torch.arange(40).unsqueeze(1), place[..., 1], place[..., 0]]
    parts = {"left eye": "eyes", "right eye": "eyes", "nose": "nose", "left ear": "skin"}
    covers = {"hair", "glasses", "hat"}  # a fringe hangs over an eye, and the eye still counts as visible
    for name, part in parts.items():
        column = KEYPOINTS.index(name)
        classes = [PARTS[i] for i in found[:, column][points.visible[:, column]]]
        assert set(classes) <= {part} | covers, name
        assert classes.count(part) >= 0.9 * len(classes), name
    truth = zoo.memorised()
    for people, told in ((verbatim_people(), truth.verbatim_images), (template_people(), truth.template_images)):
        trained = draw_pictures(people).images  # as the recipe trains on them
        assert float((trained / 255 - told.reshape(trained.shape)).abs().max()) < 0.51 / 255
    with torch.no_grad():
        judged = load_attribute_network(shipped_folder("portraits-oracle"))
        portraits, person = zoo.identities(20, 2)
        read = accuracies(judged, portraits.images, portraits.labels)
    assert min(read[name] for name in ("skin", "style", "background")) > 0.9
    assert all(len(set(portraits.labels["hair"][person == number].tolist())) == 1 for number in range(20))


def test_a_missed_promise_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    gates = [Gate("a", 0.5, 0.4), Gate("b", 0.5, 0.6), Gate("c", 0.5, 0.6, "at most")]
    monkeypatch.setattr("diffcore.zoo.check.check", lambda *args: gates)
    assert app(["zoo", "check", "digits8-edm", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["missed"] == ["b"]
    monkeypatch.setattr("diffcore.zoo.check.check", lambda *args: gates[:1])
    assert app(["zoo", "check", "digits8-edm"]) == 0
    assert "kept" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["digits8-edm", "digits8-classifier", "digits-styles-oracle", "portraits-oracle"])
def test_samples_are_written(name: str, tmp_path: Path):
    """Judges show what they judge."""
    assert app(["zoo", "samples", name, "--out", str(tmp_path / "sheet.png")]) == 0
    assert (tmp_path / "sheet.png").stat().st_size > 1000


def test_the_data_sheet_marks_what_is_known():
    images, columns, _ = show.samples("portraits-oracle", shipped_folder("portraits-oracle"), Runtime(device="cpu"))
    people, painted, dotted, *_ = images.split(columns)
    assert len(painted.movedim(1, -1).flatten(0, 2).unique(dim=0)) >= 9  # parts
    marked = (dotted != people).any(1).sum((1, 2))
    assert ((marked >= 9 * 8) & (marked <= 9 * len(KEYPOINTS))).all()


def test_the_list_tells_sizes(capsys: pytest.CaptureFixture[str]):
    assert app(["zoo", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["portraits-sd"]["megabytes"] > 1
