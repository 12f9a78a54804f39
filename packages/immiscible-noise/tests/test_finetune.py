"""Fine-tuning a model on cached latents: what is trained, what resumes, what plain diffusers makes of the result."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from diffcore.cli import main
from diffcore.data import ImageSet, load_images
from diffcore.denoiser import NetworkDenoiser
from diffcore.errors import UserError
from diffcore.io import artifact
from diffcore.models import from_pipeline, load
from diffcore.models.codec import LatentCodec
from diffcore.noise import philox_normal
from diffcore.run import Run
from diffcore.runtime import Runtime
from diffcore.testing import tiny
from diffcore.train import StepSampler
from diffcore.train.module import NOISE, TIMESTEP
from immiscible_noise import Coupling, assign_noise, assign_noise_softly, warn_if_stochastic
from immiscible_noise.app.cli import app
from immiscible_noise.app.options import FineTuning, Training
from immiscible_noise.study.export import LORA
from immiscible_noise.study.finetune import CaptionedBatches, FineTuneModule, FineTuner
from immiscible_noise.study.pairing import pair_noise_of
from immiscible_noise.study.settings import FineTuneSettings
from immiscible_noise.study.train import load_snapshot, read_recipe
from immiscible_noise.study.tuned_recipe import FineTuneRecipe, told_of
from immiscible_noise.study.tuning_set import TuningSet, check_images

CPU = Runtime(device="cpu")
WORDS = ("red", "green", "blue", "grey")
FEW = ["--steps", "6", "--batch-size", "4", "--snapshots", "2", "--checkpoint-every", "2", "--device", "cpu"]
RATE = ["--learning-rate", "1e-3"]
QUICK = ["--num-samples", "8", "--sampling-steps", "2", "3"]


def paint(folder: Path, *, captions: int = 4, count: int = 12, side: int = 16) -> Path:
    """Writes images with a caption beside each; every so many images the captions come again."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"a {WORDS[i % captions % 4]} toy {i % captions}\n")
    return folder


@pytest.fixture(scope="session")
def painted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint(tmp_path_factory.mktemp("data") / "painted")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny.pipeline("sd15").save_pretrained(folder)
    return folder


def run(*tokens: object) -> int:
    return app([str(token) for token in tokens])


def refused(capsys: pytest.CaptureFixture[str], *tokens: object) -> str:
    assert main(app, [str(token) for token in tokens]) == 2
    return " ".join(capsys.readouterr().err.split())


def weights(folder: Path, step: int = 6) -> dict[str, Tensor]:
    return artifact.load(folder / "parts" / f"snapshot-{step:08d}").tensors


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def tuning_set(tmp_path: Path, *, captions: int = 4, name: str = "sd15") -> TuningSet:
    data = paint(tmp_path / "data", captions=captions)
    images = load_images(data)
    told = [(data / name).with_suffix(".txt").read_text().strip() for name in images.names]
    with Run.open(tmp_path / "run", command="immiscible-noise train", config={}) as opened:
        return TuningSet.encode(from_pipeline(tiny.pipeline(name)), images, told, opened)


def recipe_with(data: TuningSet, coupling: Coupling, **changes: Any) -> FineTuneRecipe:
    settings = FineTuneSettings(**{"steps": 1000, "batch_size": 4} | changes)
    told = told_of(coupling, data)
    return FineTuneRecipe(coupling, settings, "tiny", data.model.fingerprint, (3, 16, 16), told, 3, data)


class Echo(nn.Module):
    """A network that returns its input, and keeps that and its condition."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        self.seen = x.detach().clone(), t.clone(), encoder_hidden_states.clone()
        return x + 0 * self.weight


@pytest.mark.parametrize("kind", ["sd15", "sd21"])  # predictions of noise and of v
@pytest.mark.parametrize("captions", [4, 12], ids=["shared captions", "a caption each"])
def test_the_loss_is_that_by_hand_with_the_permutation_of_the_assignment(tmp_path: Path, kind: str, captions: int):
    data = tuning_set(tmp_path, captions=captions, name=kind)
    data = replace(data, latents=data.latents / data.latents.std())  # as latents of trained models are
    recipe = recipe_with(data, Coupling("assignment"), batch_size=12)
    batches, network, plain = CaptionedBatches(data, recipe), Echo(), data.model.denoiser
    module = FineTuneModule(
        NetworkDenoiser(network, plain.schedule, plain.prediction_type),
        batches=batches,
        optimizer=recipe.optimizer,
        pair_noise=pair_noise_of(recipe.coupling, recipe.seed, recipe.settings, batches),
        seed=recipe.seed,
    )
    module.log = lambda *_, **__: None
    module.iteration = 5
    indices = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    loss = module.training_step(module.on_before_batch_transfer(batches.__getitems__(indices), 0), 0)

    x0, places = data.latents[indices], data.places[indices]
    drawn = philox_normal(3, torch.arange(12), x0.shape[1:], step=5, stream=NOISE)
    if captions == 4:
        noise, info = assign_noise(x0, drawn, labels=places, return_info=True)
        assert torch.equal(places[info.permutation], places)
    else:
        noise = assign_noise_softly(x0, drawn, data.table.vectors[places], target=1 / 12 + 0.2 * 11 / 12).noise
    assert not torch.equal(noise, drawn)
    x_t, t, states = network.seen
    assert torch.equal(t, module._timesteps(x0, 5, TIMESTEP))
    alpha, sigma = (level.view(-1, 1, 1, 1) for level in plain.schedule.alpha_sigma(t))
    torch.testing.assert_close(x_t, alpha * x0 + sigma * noise)
    target = noise if plain.prediction_type == "epsilon" else alpha * noise - sigma * x0
    torch.testing.assert_close(loss, (x_t - target).square().mean())
    assert torch.equal(states, data.table.rows["encoder_hidden_states"][places])


def test_latents_and_captions_are_what_the_pipeline_makes_of_them(tmp_path: Path):
    data, pipe = tuning_set(tmp_path), tiny.pipeline("sd15")
    images = load_images(tmp_path / "data").x0()
    wanted = pipe.vae.encode(images).latent_dist.mode() * pipe.vae.config.scaling_factor
    torch.testing.assert_close(data.latents, wanted.detach())
    caption = (tmp_path / "data" / "05.txt").read_text().strip()
    states, empty = pipe.encode_prompt([caption], "cpu", 1, True)
    row = data.table[data.places[5:6]]["encoder_hidden_states"]
    torch.testing.assert_close(row, states.detach())
    torch.testing.assert_close(data.table[torch.tensor([data.table.empty])]["encoder_hidden_states"], empty.detach())
    assert data.table.names[data.places[5]] == caption


def test_dropped_captions_are_a_label_of_their_own_and_belong_to_the_visit(tmp_path: Path):
    data = tuning_set(tmp_path)
    recipe = recipe_with(data, Coupling("assignment"), caption_dropout=0.3)
    batches, visits = CaptionedBatches(data, recipe), torch.arange(2000)
    indices = torch.arange(2000) % 12
    whole = batches.at_visits(batches.__getitems__(indices), visits)
    dropped = whole["labels"] == data.table.empty
    assert 0.26 < dropped.float().mean() < 0.34
    assert torch.equal(whole["labels"][~dropped], data.places[indices][~dropped])
    blank = data.table.rows["encoder_hidden_states"][data.table.empty]
    assert (whole["condition"]["encoder_hidden_states"][dropped] == blank).all()
    part = batches.at_visits(batches.__getitems__(indices[700:716]), visits[700:716])
    assert torch.equal(part["labels"], whole["labels"][700:716])


def pairs(data: TuningSet, batch_size: int, ranks: int = 1) -> Iterator[tuple[int, Tensor]]:
    """Yields sample and noise of the first 48 visits of a training with batches of a size over some ranks."""
    recipe = recipe_with(data, Coupling("assignment", window=24), batch_size=batch_size, caption_dropout=0.2)
    batches, share = CaptionedBatches(data, recipe), batch_size // ranks
    hooks = [pair_noise_of(recipe.coupling, 5, recipe.settings, batches) for _ in range(ranks)]
    for step in range(48 // batch_size):
        for rank, hook in enumerate(hooks):
            start = step * batch_size + rank * share
            indices = StepSampler(len(batches), batch_size, 5).samples(start, start + share)
            batch = batches.at_visits(batches.__getitems__(indices), torch.arange(start, start + share))
            noise = hook(batch["x0"], torch.zeros_like(batch["x0"]), {**batch, "step": step, "rank": rank})
            yield from zip(indices.tolist(), noise, strict=True)


def test_windows_of_latents_depend_neither_on_the_batch_size_nor_on_the_ranks(tmp_path: Path):
    data = tuning_set(tmp_path)
    expected = list(pairs(data, 12))
    for batch_size, ranks in ((1, 1), (8, 2)):
        for found, before in zip(pairs(data, batch_size, ranks), expected, strict=True):
            assert found[0] == before[0]
            assert torch.equal(found[1], before[1])


def test_windows_of_latents_keep_noise_inside_captions_after_dropout(tmp_path: Path):
    data = tuning_set(tmp_path)
    recipe = recipe_with(data, Coupling("assignment", window=24), caption_dropout=0.3)
    batches = CaptionedBatches(data, recipe)
    found = first_noises(recipe, batches, Coupling("assignment", window=24))
    drawn = first_noises(recipe, batches, Coupling("assignment", window=24, strength=0.0))
    visits = torch.arange(24)
    indices = StepSampler(len(batches), 4, 5).samples(0, 24)
    batch = batches.at_visits(batches.__getitems__(indices), visits)
    assert (batch["labels"] == data.table.empty).any()
    assert torch.equal(found, assign_noise(batch["x0"], drawn, labels=batch["labels"]))


def first_noises(recipe: FineTuneRecipe, batches: CaptionedBatches, coupling: Coupling) -> Tensor:
    """Returns the noises of the first 24 visits, in batches of four."""
    hook, found = pair_noise_of(coupling, 5, recipe.settings, batches), []
    for step in range(6):
        indices = StepSampler(len(batches), 4, 5).samples(4 * step, 4 * step + 4)
        batch = batches.at_visits(batches.__getitems__(indices), torch.arange(4 * step, 4 * step + 4))
        found.append(hook(batch["x0"], torch.zeros_like(batch["x0"]), {**batch, "step": step, "rank": 0}))
    return torch.cat(found)


def test_captions_that_are_shared_are_labels_and_others_are_compared(tmp_path: Path):
    shared, apart = tuning_set(tmp_path / "a"), tuning_set(tmp_path / "b", captions=12)
    assert (told_of(Coupling(), shared), told_of(Coupling(), apart)) == ("block", "soft")
    assert told_of(Coupling(condition="soft"), shared) == "soft"
    assert told_of(Coupling(condition="ignore"), apart) == "ignore"
    bare = replace(shared, places=None, table=None)
    assert told_of(Coupling(), bare) == "nothing"
    with pytest.raises(UserError, match="`condition` is soft"):
        told_of(Coupling(condition="soft"), bare)


@pytest.mark.parametrize("rank", [0, 2], ids=["whole", "lora"])
def test_an_interrupted_fine_tuning_continues_to_the_same_weights(
    painted: Path, model: Path, tmp_path: Path, rank: int, monkeypatch: pytest.MonkeyPatch
):
    command = ["train", painted, "--model", model, *FEW, *RATE, "--caption-dropout", "0.3"]
    command += ["--lora-rank", rank] if rank else []
    assert run(*command, "--out", tmp_path / "whole") == 0
    write, encoded = L.Trainer.save_checkpoint, []

    def cut(trainer: L.Trainer, path: Path, **options: Any) -> None:
        write(trainer, path, **options)
        if trainer.lightning_module.iteration == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(L.Trainer, "save_checkpoint", cut)
        with pytest.raises(KeyboardInterrupt):
            run(*command, "--out", tmp_path / "cut")
    assert not (tmp_path / "cut" / "result.json").exists()
    encode = LatentCodec.encode
    monkeypatch.setattr(LatentCodec, "encode", lambda *a, **k: encoded.append(1) or encode(*a, **k))
    assert run(*command, "--out", tmp_path / "cut") == 0
    assert not encoded, "latents are encoded once"
    assert_same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    half = weights(tmp_path / "cut", 3)
    assert any(not torch.equal(value, half[name]) for name, value in weights(tmp_path / "cut").items())


@pytest.mark.parametrize("rank", [0, 2], ids=["whole", "lora"])
def test_two_processes_fine_tune_as_one(painted: Path, model: Path, tmp_path: Path, rank: int):
    """Vanilla, so that nothing depends on which rows share a rank."""
    command = ["train", painted, "--model", model, "--method", "vanilla", *FEW, *RATE, "--caption-dropout", "0.3"]
    command += ["--lora-rank", rank] if rank else []
    assert run(*command, "--out", tmp_path / "one") == 0
    child = os.fork()
    if child == 0:
        code = 99
        try:
            two = ["--out", tmp_path / "two", "--devices", "2", "--strategy", "ddp_fork"]
            code = main(app, [str(token) for token in (*command, *two)])
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    base = load(model, CPU)
    x_t, t, states = predictions()
    outputs = []  # not the weights: Adam makes steps of full size from gradients that are zero but for rounding
    for name in ("one", "two", "start"):
        recipe = read_recipe(tmp_path / ("one" if name == "start" else name))
        assert isinstance(recipe, FineTuneRecipe)
        recipe = replace(recipe, data=TuningSet(base, None, None, None, base.shape))
        trained = base.denoiser if name == "start" else load_snapshot(recipe, tmp_path / name, 6)
        with torch.no_grad():
            outputs.append(trained(x_t, t.float(), {"encoder_hidden_states": states}).output)
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-4, rtol=1e-3)
    assert float((outputs[2] - outputs[0]).abs().max()) > 1e-3


@pytest.mark.parametrize("rank", [0, 2], ids=["whole", "lora"])
def test_gradient_checkpointing_keeps_fewer_activations_for_the_same_gradients(tmp_path: Path, rank: int):
    data = tuning_set(tmp_path)
    x_t, t, states = predictions()
    kept, gradients = [], []
    for options in (FineTuning("tiny"), FineTuning("tiny", gradient_checkpointing=True)):
        recipe = replace(recipe_with(data, Coupling()), settings=replace(options.settings(Training()), lora_rank=rank))
        denoiser, sizes = recipe.denoiser(), list[int]()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):  # noqa: B023
            denoiser(x_t, t.float(), {"encoder_hidden_states": states}).output.square().sum().backward()
        kept.append(sum(sizes))
        gradients.append({name: part.grad for name, part in denoiser.named_parameters() if part.requires_grad})
    torch.testing.assert_close(gradients[1], gradients[0])
    assert kept[1] < kept[0] / 2
    assert not data.model.backbone.is_gradient_checkpointing, "the model itself stays as it was"


def test_with_strength_zero_it_is_vanilla_to_the_last_bit(painted: Path, model: Path, tmp_path: Path):
    for name, options in {"off": ["--strength", "0"], "vanilla": ["--method", "vanilla"], "on": []}.items():
        command = ["train", painted, "--model", model, "--out", tmp_path / name, *FEW, *RATE, *options]
        assert run(*command) == 0
    assert_same(weights(tmp_path / "off"), weights(tmp_path / "vanilla"))
    assert any(not torch.equal(v, weights(tmp_path / "on")[n]) for n, v in weights(tmp_path / "vanilla").items())


def predictions(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, 8, 8, generator=g), torch.tensor([300, 800]), torch.randn(2, 7, 32, generator=g)


def test_plain_diffusers_loads_the_folder_of_a_fine_tuned_model(painted: Path, model: Path, tmp_path: Path):
    out = tmp_path / "run"
    assert run("train", painted, "--model", model, "--out", out, *FEW, *RATE) == 0
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(out / "model", local_files_only=True)
    assert_same(dict(pipe.unet.state_dict()), weights(out))
    before = load(model, CPU)
    assert any(not torch.equal(v, before.backbone.state_dict()[n]) for n, v in pipe.unet.state_dict().items())
    assert_same(dict(pipe.vae.state_dict()), dict(before.modules["vae"].state_dict()))
    told = json.loads((out / "model" / "training.json").read_text())
    with pytest.warns(UserWarning, match="adds fresh noise"):
        assert warn_if_stochastic(diffusers.DDPMScheduler(), told)
    assert load(out / "model", CPU).denoiser.prediction_type == "epsilon"


def test_plain_diffusers_loads_the_lora_with_the_same_effect(painted: Path, model: Path, tmp_path: Path):
    out = tmp_path / "run"
    options = ["--lora-rank", "3", "--lora-alpha", "6", "--learning-rate", "1e-2"]
    assert run("train", painted, "--model", model, "--out", out, *FEW, *options) == 0
    base = load(model, CPU)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(model, local_files_only=True)
    x_t, t, states = predictions()
    plain = pipe.unet(x_t, t, states).sample.detach()
    pipe.load_lora_weights(out / "lora")
    theirs = pipe.unet(x_t, t, states).sample.detach()
    recipe = read_recipe(out)
    assert isinstance(recipe, FineTuneRecipe)
    ours = load_snapshot(replace(recipe, data=TuningSet(base, None, None, None, base.shape)), out, 6)
    found = ours(x_t, t.float(), {"encoder_hidden_states": states}).output.detach()
    torch.testing.assert_close(theirs, found, atol=1e-5, rtol=1e-4)
    assert float((theirs - plain).abs().max()) > 1e-3
    with safe_open(out / "lora" / LORA, framework="pt") as file:
        told = file.metadata()
    with pytest.warns(UserWarning, match="assignment"):
        assert warn_if_stochastic(diffusers.DDPMScheduler(), told)
    assert json.loads(told["immiscible_noise"])["conditions"] == "block"


def test_compare_and_evaluate_sample_with_the_captions_of_the_set(
    painted: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options = ["--model", model, "--lora-rank", "2", "--seeds", "1", "--couplings", "vanilla", "half"]
    out, judge = tmp_path / "study", ["--features", "random:0", "--guidance", "2"]
    assert run("compare", painted, "--out", out, *options, *FEW, *RATE, *QUICK, *judge, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result["frechet"]) == {f"{name}, {n} steps" for name in ("vanilla", "half") for n in (2, 3)}
    assert result["features"].startswith("random:0")
    page = (out / "report.html").read_text()
    assert "Decoded latents" in page
    training = out / "couplings" / "half-seed0"
    evaluated = ["evaluate", training, painted, "--out", tmp_path / "e", *QUICK, *judge, "--device", "cpu", "--json"]
    assert run(*evaluated) == 0
    again = json.loads(capsys.readouterr().out)
    for steps in (2, 3):
        assert again["frechet"][f"half, {steps} steps"] == result["frechet"][f"half, {steps} steps"]
    assert run(*evaluated[:4], tmp_path / "plain", *QUICK, *judge[:2], "--device", "cpu", "--json") == 0
    assert json.loads(capsys.readouterr().out)["frechet"] != again["frechet"], "guidance changes the samples"


def test_another_model_is_not_taken_for_the_one_that_was_fine_tuned(
    painted: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run("train", painted, "--model", model, "--out", tmp_path / "run", *FEW, "--lora-rank", "2")
    tiny.pipeline("sd15", seed=9).save_pretrained(tmp_path / "other")
    base = ["--base", tmp_path / "other", "--out", tmp_path / "e"]
    told = refused(capsys, "evaluate", tmp_path / "run", painted, *base, *QUICK)
    assert "another model" in told
    assert "--base" in told


def test_classes_are_the_conditions_of_a_class_conditional_model(tmp_path: Path):
    tiny.pipeline("dit").save_pretrained(tmp_path / "dit")
    rng = np.random.default_rng(0)
    for i in range(8):
        folder = tmp_path / "data" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    options = ["--model", tmp_path / "dit", "--caption-dropout", "0.2", "--lora-rank", "2"]
    command = ["train", tmp_path / "data", *options, *FEW]
    assert run(*command, "--out", tmp_path / "run") == 0
    recipe = read_recipe(tmp_path / "run")
    assert isinstance(recipe, FineTuneRecipe)
    assert recipe.told == "block"
    assert any(bool(value.any()) for name, value in weights(tmp_path / "run").items() if "lora_B" in name)


def test_a_tuner_trains_from_a_pipeline_in_memory_and_leaves_it_alone(tmp_path: Path):
    data = tuning_set(tmp_path)
    before = {name: value.clone() for name, value in data.model.backbone.state_dict().items()}
    images = load_images(tmp_path / "data")
    settings = FineTuneSettings(steps=2, batch_size=4, snapshots=1, learning_rate=1e-3)
    with Run.open(tmp_path / "tuned", command="immiscible-noise train", config={}) as opened:
        recipe = FineTuner(data, "tiny")(images, opened, Coupling("knn", k=2), settings, CPU)
    tuned = load_snapshot(recipe, tmp_path / "tuned", 2)
    assert_same(before, dict(data.model.backbone.state_dict()))
    assert any(not torch.equal(value, before[name]) for name, value in tuned.backbone.state_dict().items())


def test_an_image_is_drawn_from_its_own_row_and_condition(tmp_path: Path):
    data = tuning_set(tmp_path)
    recipe = recipe_with(data, Coupling())
    denoiser, rows, same = data.model.denoiser, torch.arange(3), torch.zeros(3, dtype=torch.int64)
    drawn = recipe.generate(denoiser, rows, same, steps=2)
    assert not torch.equal(drawn[0], drawn[1])
    alone = recipe.generate(denoiser, rows[2:], same[2:], steps=2)
    torch.testing.assert_close(alone, drawn[2:], atol=1e-5, rtol=1e-5)
    other = recipe.generate(denoiser, rows, same + 1, steps=2)
    assert not torch.allclose(other, drawn, atol=1e-6)
    assert not torch.allclose(recipe.generate(denoiser, rows, same, steps=2, guidance=3.0), drawn, atol=1e-6)


def test_more_classes_than_a_model_knows_are_refused(tmp_path: Path):
    model = from_pipeline(tiny.pipeline("dit"))
    known = int(model.backbone.config["num_embeds_ada_norm"])
    names = tuple(f"class{number}" for number in range(known + 1))
    pixels = torch.zeros(known + 1, 3, 16, 16, dtype=torch.uint8)
    images = ImageSet(pixels, torch.arange(known + 1), names, names)
    with pytest.raises(UserError, match=f"knows {known} classes, the images have {known + 1}"):
        check_images(model, images)
    check_images(model, replace(images, classes=names[:known]))
    with pytest.raises(UserError, match="put the images of each class into a folder"):
        check_images(model, replace(images, labels=None))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--lora-rank", "4"], "--lora-rank is for fine-tuning"),
        (["--prompt", "a toy"], "--prompt is for fine-tuning"),
        (["--model", "MODEL", "--width", "64"], "--width is for a new model"),
        (["--model", "MODEL", "--class-conditional"], "--class-conditional is for a new model"),
        (["--model", "MODEL", "--lora-rank", "-1"], "--lora-rank is -1"),
        (["--model", "MODEL", "--caption-dropout", "1"], "--caption-dropout is 1"),
        (["--model", "MODEL", "--lora-rank", "2", "--lora-targets", "to_x"], "to_x"),
        (["--model", "MODEL", "--size", "15"], "--size 14"),
        (["--model", "MODEL", "--prompt", "a {class}"], "no folder for each class"),
        (["--model", "MODEL", "--batch-size", "3", "--devices", "2"], "2 processes"),
        (["--model", "MODEL", "--condition", "soft", "--cost", "l1"], "--cost is l1"),
        (["--model", "nowhere"], "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_options_that_do_not_fit_leave_no_folder(
    painted: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], told: str
):
    given = [model if option == "MODEL" else option for option in options]
    assert told in refused(capsys, "train", painted, "--out", tmp_path / "out", *given)
    assert not (tmp_path / "out").exists()


def test_a_network_without_blocks_to_compute_again_is_refused(
    painted: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(diffusers.UNet2DConditionModel, "_supports_gradient_checkpointing", False)
    command = ["train", painted, "--model", model, "--gradient-checkpointing", "--out", tmp_path / "out"]
    assert "leave out --gradient-checkpointing" in refused(capsys, *command)
    assert not (tmp_path / "out").exists()


def test_captions_of_their_own_are_not_compared_over_processes(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = paint(tmp_path / "data", captions=12)
    command = ["train", data, "--model", model, "--scope", "global", *FEW, "--out", tmp_path / "out"]
    assert "take --window 4 in place of --scope" in refused(capsys, *command)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="`scope` is global"):
        told_of(Coupling(scope="global"), tuning_set(tmp_path / "b", captions=12))


def test_images_without_captions_are_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for path in paint(tmp_path / "data").glob("*.txt"):
        path.unlink()
    assert "has no captions" in refused(capsys, "train", tmp_path / "data", "--model", model, *FEW)
