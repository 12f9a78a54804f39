"""Generator and student score as LoRA on the teacher's weights: the same gradients, one copy, small checkpoints."""

import copy
import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from diffcore.cli import main
from diffcore.denoiser import GuidedDenoiser, NetworkDenoiser
from diffcore.errors import IncompatibleModelError, MachineError, UserError
from diffcore.models import from_pipeline
from diffcore.run import Run
from diffcore.runtime import Runtime
from diffcore.testing import tiny
from diffcore.testing.distributed import run_forked
from diffcore.train import EMA, fit, iterations_done
from emd_distill.app.cli import app
from emd_distill.app.options_training import TrainingOptions
from emd_distill.app.training import Training, train_generator
from emd_distill.chain import frozen
from emd_distill.cost import weight_megabytes
from emd_distill.distill import Settings, distill, student_of
from emd_distill.doctor import memory_estimate
from emd_distill.files.export import export, export_lora
from emd_distill.files.generators import load_generator, save_generator
from emd_distill.generator import OneStepGenerator
from emd_distill.lora import LoraDenoiser, learnable, lora_of
from emd_distill.losses import EMD
from emd_distill.module import DistillModule
from emd_distill.noise_levels import noise_levels

CPU = Runtime(device="cpu")
RANK = 3
assert_equal = partial(torch.testing.assert_close, rtol=0, atol=0)


def classes(step: int, rows: Tensor) -> dict[str, Tensor]:
    return {"class_labels": (rows + step) % 10}


def pointers(network: nn.Module) -> dict[int, int]:
    """Bytes of each storage of a network's parameters."""
    return {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in network.parameters()}


def moved(lora: LoraDenoiser, seed: int = 0, size: float = 0.05) -> LoraDenoiser:
    """The same with a change that is not zero."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in lora.parameters():
            if part.requires_grad:
                part.add_(size * torch.randn(part.shape, generator=g))
    return lora


def settings(**changes: Any) -> Settings:
    rates = {"learning_rate": 1e-2, "student_learning_rate": 5e-3}
    return Settings(**{"loss": EMD(num_steps=2, gamma_z=0.01), "steps": 6, "batch_size": 2, **rates} | changes)


def test_it_starts_as_the_teacher_and_is_its_own_merged_network():
    teacher, g = tiny.denoiser("unet2d"), torch.Generator().manual_seed(0)
    x, t, given = torch.randn(2, 3, 8, 8, generator=g), torch.tensor([10.0, 700.0]), classes(0, torch.arange(2))
    lora = LoraDenoiser(teacher, RANK)
    with torch.no_grad():
        before = teacher(x, t, given).output
        assert torch.equal(lora(x, t, given).output, before)
        moved(lora)
        assert float((lora(x, t, given).output - before).abs().max()) > 1e-2
        torch.testing.assert_close(lora.merged()(x, t, given).output, lora(x, t, given).output, rtol=1e-4, atol=1e-5)
        assert torch.equal(teacher(x, t, given).output, before)


def test_gradients_are_those_of_the_whole_weights_along_the_factors():
    """dL / dB = alpha / rank dL/dW A^T and dL / dA = alpha / rank B^T dL/dW, for linear layers and convolutions."""
    teacher = tiny.denoiser("unet2d")
    lora = moved(LoraDenoiser(teacher, RANK, alpha=2.0))
    whole = OneStepGenerator(copy.deepcopy(lora.merged()).requires_grad_(True), 700)
    small = OneStepGenerator(lora, 700)
    g = torch.Generator().manual_seed(1)
    z, pull = torch.randn(2, 2, 3, 8, 8, generator=g)
    given = classes(0, torch.arange(2))
    for network in (whole, small):
        (network(z, given) * pull).sum().backward()
    worst, kinds = 0.0, set()
    for name, (down, up) in lora.factors.items():
        gradient = whole.denoiser.backbone.get_submodule(name).weight.grad.flatten(1)
        layer = lora.network.backbone.get_submodule(name)
        kinds.add(type(layer.get_base_layer()).__name__)
        wanted = 2 / RANK * up.T @ gradient, 2 / RANK * gradient @ down.flatten(1).T
        for part, value in zip((layer.lora_A, layer.lora_B), wanted, strict=True):
            found = part["default"].weight.grad.flatten(1)
            worst = max(worst, float((found - value).norm() / value.norm().clamp(min=1e-8)))
    assert kinds == {"Linear", "Conv2d"}
    assert worst < 1e-3
    assert all(p.grad is None for p in teacher.parameters())


def test_three_networks_hold_the_teachers_weights_once():
    model = tiny.model("unet2d")
    teacher = model.denoiser
    generator = OneStepGenerator(LoraDenoiser(teacher, RANK), 900)
    few = settings(loss=EMD(num_steps=1), steps=1)
    done = distill(teacher, generator, model.shape, few, conditions=classes)
    student = done.student
    base = pointers(teacher)
    assert isinstance(student, LoraDenoiser)
    for network in (generator, student, done.generator):
        own = {place: size for place, size in pointers(network).items() if place not in base}
        assert base.keys() <= pointers(network).keys()
        assert sum(own.values()) == 4 * sum(p.numel() for p in learnable(network))
        assert sum(own.values()) < sum(base.values()) / 3
    apart = [{id(p) for p in learnable(network)} for network in (generator, student, done.generator)]
    assert len(set.union(*apart)) == sum(map(len, apart))
    # moved together: where the teacher goes, all go
    teacher.to(torch.float64)
    assert next(lora_of(generator).base_parameters()).dtype == torch.float64
    assert pointers(teacher).keys() <= pointers(generator).keys()


@pytest.mark.parametrize("guided", [False, True])
def test_only_the_lora_learns_and_the_teacher_draws_as_before(guided: bool):
    model = tiny.model("unet2d")
    plain, g = model.denoiser, torch.Generator().manual_seed(0)
    x, t, given = torch.randn(2, 3, 8, 8, generator=g), torch.tensor([10.0, 700.0]), classes(0, torch.arange(2))
    before, weights = plain(x, t, given).output, copy.deepcopy(plain.state_dict())
    teacher = GuidedDenoiser(plain, 2.0, {"class_labels": torch.tensor([0])}) if guided else plain
    generator = OneStepGenerator(LoraDenoiser(plain, RANK, targets=["to_q", "conv1"]), 900)
    start = copy.deepcopy(generator.state_dict())
    done = distill(teacher, generator, model.shape, settings(), conditions=classes)
    assert_equal(plain.state_dict(), weights)
    assert torch.equal(plain(x, t, given).output, before)
    assert isinstance(done.student, LoraDenoiser)
    for network in (generator, done.student):
        assert all("lora" in name for name in network.state_dict())
        assert {name.rsplit(".", 4)[1] for name in network.state_dict()} == {"to_q", "conv1"}
    changed = [name for name, value in generator.state_dict().items() if not torch.equal(value, start[name])]
    assert len(changed) == len(start)
    z = torch.randn(2, *model.shape, generator=g)
    with torch.no_grad():
        assert not torch.equal(done.generator(z, given), generator(z, given))  # an average of its own


def test_a_student_is_a_lora_only_on_the_same_teacher():
    one, other = tiny.denoiser("unet2d"), tiny.denoiser("unet2d")
    generator = OneStepGenerator(LoraDenoiser(one, RANK), 900)
    assert isinstance(student_of(one, generator), LoraDenoiser)
    assert isinstance(student_of(other, generator), NetworkDenoiser)


def test_the_chain_calls_the_generator_with_constant_factors():
    """Nothing is kept in a chain for the gradients of a LoRA."""
    teacher = tiny.denoiser("unet2d")
    generator = OneStepGenerator(moved(LoraDenoiser(teacher, RANK)), 900)
    z, given = torch.randn(1, 3, 8, 8).requires_grad_(), classes(0, torch.arange(1))
    with frozen(generator) as call:
        call(z, given).sum().backward()
    assert z.grad is not None
    assert all(p.grad is None for p in generator.parameters())


def module_of(model: Any, told: Settings) -> DistillModule:
    generator = OneStepGenerator(LoraDenoiser(model.denoiser, RANK), 900)
    return DistillModule(model.denoiser, generator, model.shape, told, conditions=classes)


def train_to(
    folder: Path, *callbacks: L.Callback, runtime: Runtime = CPU, **changes: Any
) -> dict[str, dict[str, Tensor]]:
    """Returns the LoRA of all networks that the training leaves."""
    told = settings(**changes)
    module, ema = module_of(tiny.model("unet2d"), told), EMA(0.9, network="generator")
    fit(
        module, steps=told.steps, folder=folder, runtime=runtime, callbacks=[ema, *callbacks],
        checkpoint_every=2, log_every=2, gradient_clip=1.0,
    )  # fmt: skip
    parts = {"student": module.student, "generator": module.generator, "average": ema.average}
    return {name: dict(part.state_dict()) for name, part in parts.items()}


def test_a_killed_training_goes_on_bit_for_bit_from_a_small_checkpoint(tmp_path: Path):
    whole = train_to(tmp_path / "whole")

    class Kill(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: Any, *_: object) -> None:  # pyright: ignore
            if module.iteration == 3:
                os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        train_to(tmp_path / "killed", Kill())
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    path = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    assert iterations_done(path) == 2
    kept = torch.load(path, weights_only=True)
    assert all("lora" in name for name in kept["state_dict"])
    assert all("lora" in name for name in kept["callbacks"]["EMA of generator"])
    count = len(kept["state_dict"]) // 2
    assert [len(part["state"]) for part in kept["optimizer_states"]] == [count, count]
    assert_equal(train_to(tmp_path / "killed"), whole)
    assert (tmp_path / "killed" / "log.jsonl").read_text() == (tmp_path / "whole" / "log.jsonl").read_text()


def test_two_processes_equal_one_at_the_whole_batch(tmp_path: Path):
    def on_rank(rank: int) -> dict[str, dict[str, Tensor]]:
        os.environ.update(
            {"TORCHELASTIC_RUN_ID": "test", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            | {"GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
        )
        return train_to(tmp_path / "two", runtime=Runtime(device="cpu", devices=2, strategy="ddp"), steps=2)

    one = train_to(tmp_path / "one", steps=2)
    first, second = run_forked(on_rank, timeout_seconds=300.0)
    assert_equal(first, second)
    start = module_of(tiny.model("unet2d"), settings()).state_dict()
    for name in ("student", "generator"):
        way, other = (
            torch.cat([(part - start[f"{name}.{key}"]).flatten() for key, part in found[name].items()])
            for found in (one, first)
        )
        assert float((way - other).norm() / way.norm()) < 0.05  # Adam divides small gradients by their size


def test_it_is_distill_with_lightning(tmp_path: Path):
    model = tiny.model("unet2d")
    found = train_to(tmp_path)
    generator = OneStepGenerator(LoraDenoiser(model.denoiser, RANK), 900)
    done = distill(model.denoiser, generator, model.shape, settings(ema=0.9), conditions=classes)
    assert_equal(found["generator"], dict(generator.state_dict()))
    assert_equal(found["average"], dict(done.generator.state_dict()))


def test_what_cannot_be_is_refused():
    teacher = tiny.denoiser("unet2d")
    with pytest.raises(ValueError, match="`rank` is 0"):
        LoraDenoiser(teacher, 0)
    with pytest.raises(ValueError, match="no linear or convolutional module"):
        LoraDenoiser(teacher, 2, targets=["to_x"])
    with pytest.raises(UserError, match="carries a LoRA"):
        LoraDenoiser(LoraDenoiser(teacher, 2).network, 2)


def pipeline_generator(t: float) -> tuple[Any, OneStepGenerator]:
    model = from_pipeline(tiny.pipeline("sd15"))
    return model, OneStepGenerator(moved(LoraDenoiser(model.denoiser, RANK, alpha=2.0)), t).eval()


@pytest.mark.parametrize("t", [999, 399])
def test_a_lora_file_draws_g_in_the_teachers_pipeline_by_plain_diffusers(tmp_path: Path, t: int):
    import diffusers

    model, generator = pipeline_generator(t)
    done = export_lora(model, generator, tmp_path / "lora", licence="mit", training={"num_steps": 4})
    assert done.error is not None
    assert done.error < 1e-5
    pipe: Any = tiny.pipeline("sd15")  # the teacher as its users have it
    pipe.load_lora_weights(tmp_path / "lora")
    stated = json.loads((tmp_path / "lora" / "scheduler" / "scheduler_config.json").read_text())
    pipe.scheduler = getattr(diffusers, stated["_class_name"]).from_pretrained(tmp_path / "lora" / "scheduler")
    pipe.set_progress_bar_config(disable=True)
    prompts, z = ["a cat", "two dogs"], torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    found = pipe(prompts, num_inference_steps=1, guidance_scale=1.0, latents=z.clone(), output_type="latent").images
    given = model.prompts(prompts)
    with torch.no_grad():
        wanted, plain = generator(z, given), OneStepGenerator(model.denoiser, t)(z, given)
    assert float((found - wanted).abs().max()) < 1e-5 * max(float(wanted.abs().max()), 1)
    assert float((plain - wanted).abs().max()) > 1e-2  # the LoRA matters
    assert not any("lora" in name for name, _ in model.denoiser.named_parameters())  # the teacher is left alone
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "load_lora_weights" in card
    assert stated["_class_name"] in card
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "lora").rglob("*.json"))
    with pytest.raises(UserError, match="holds a LoRA for pipelines"):
        load_generator(tmp_path / "lora", model)


def test_it_is_merged_into_an_ordinary_folder_too(tmp_path: Path):
    from diffusers import DiffusionPipeline

    model, generator = pipeline_generator(999)
    before = copy.deepcopy(model.denoiser.state_dict())
    export(model, generator, tmp_path / "one")
    pipe: Any = DiffusionPipeline.from_pretrained(tmp_path / "one")
    assert not any("lora" in name for name, _ in pipe.unet.named_parameters())
    pipe.set_progress_bar_config(disable=True)
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    found = pipe(["a cat"], num_inference_steps=1, guidance_scale=1.0, latents=z.clone(), output_type="latent").images
    with torch.no_grad():
        wanted = generator(z, model.prompts(["a cat"]))
    assert float((found - wanted).abs().max()) < 1e-5 * max(float(wanted.abs().max()), 1)
    assert_equal(model.denoiser.state_dict(), before)


def test_a_lora_is_exported_only_where_it_can_be_read(tmp_path: Path):
    model, generator = pipeline_generator(999)
    with pytest.raises(UserError, match="is no LoRA"):
        export_lora(model, OneStepGenerator(model.denoiser, 999), tmp_path / "a")
    bare = from_pipeline(tiny.backbone("unet2d"))
    with pytest.raises(IncompatibleModelError, match="no pipeline that reads"):
        export_lora(bare, OneStepGenerator(LoraDenoiser(bare.denoiser, 2), 900), tmp_path / "a")
    with pytest.MonkeyPatch.context() as patched:
        factors = LoraDenoiser.factors.fget(generator.denoiser)
        doubled = {name: (down, 2 * up) for name, (down, up) in factors.items()}
        patched.setattr(LoraDenoiser, "factors", property(lambda self: doubled))
        with pytest.raises(MachineError, match="other samples than the generator"):
            export_lora(model, generator, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_it_is_stored_as_small_as_it_is_and_read_on_its_teacher_alone(tmp_path: Path):
    model, generator = pipeline_generator(999)
    path = save_generator(tmp_path / "g.safetensors", generator, model=model, source="somewhere")
    assert path.stat().st_size < 8 * 4 * sum(p.numel() for p in learnable(generator)) + 40_000
    read = load_generator(path, model).generator
    z, given = torch.randn(2, 4, 8, 8), model.prompts(["a", "b"])
    with torch.no_grad():
        assert torch.equal(read(z, given), generator(z, given))
    assert lora_of(read) is not None
    other = from_pipeline(tiny.pipeline("sd15", seed=1))
    with pytest.raises(IncompatibleModelError, match="not the model"):
        load_generator(path, other)


def test_the_command_trains_samples_and_exports_a_lora(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tiny.pipeline("sd15").save_pretrained(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    run = str(tmp_path / "run")
    command = ["train", str(tmp_path / "teacher"), "--prompts", str(tmp_path / "prompts.txt"), "--lora-rank", "2"]
    command += ["--steps", "2", "--batch-size", "2", "--num-langevin-steps", "1", "--num-looks", "1", "--preset", "toy"]
    command += ["--device", "cpu", "--timestep", "999", "--high", "14", "--out", run]
    assert main(app, [*command, "--dry-run", "--json"]) == 0
    small = json.loads(capsys.readouterr().out)
    assert "LoRA of rank 2" in small["generator"]
    assert main(app, [*command[:4], *command[6:], "--dry-run", "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert small["megabytes_on_disk"] < whole["megabytes_on_disk"] / 4
    assert small["megabytes_without_activations"] < whole["megabytes_without_activations"] / 4
    assert main(app, command) == 0
    loaded = load_generator(run)
    assert loaded.facts["lora"] == {"rank": 2, "alpha": 2.0, "targets": None}
    assert float(lora_of(loaded.generator).factors["conv_in"][1].abs().max()) > 0
    assert main(app, ["sample", run, "a cat", "--device", "cpu", "--out", str(tmp_path / "drawn")]) == 0
    capsys.readouterr()
    for words in ([], ["--lora"]):
        out = tmp_path / f"exported{len(words)}"
        assert main(app, ["export", str(tmp_path / "teacher"), run, *words, "--out", str(out), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["error"] < 1e-5
        assert (out / "pytorch_lora_weights.safetensors").exists() == bool(words)


def test_half_precision_keeps_one_copy_and_learns_in_float32(tmp_path: Path):
    model = tiny.model("unet2d")
    told = settings(steps=1)
    made = Training(
        model, "", classes(0, torch.arange(10)), 900.0, noise_levels(model.denoiser.schedule, high=20.0),
        TrainingOptions(lora_rank=RANK, steps=1, num_looks=1), Runtime(device="cpu", dtype="bfloat16"),
    )  # fmt: skip
    seen: list[Any] = []
    with Run.open(tmp_path / "run", command="emd-distill train", config={}, inputs={}) as run:
        train_generator(made, told, run, callbacks=[Seen(seen)])
    (module,) = seen
    base = pointers(module.teacher)
    assert base.keys() <= pointers(module.student).keys() & pointers(module.generator).keys()
    assert {p.dtype for p in module.teacher.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in learnable(module.generator)} == {torch.float32}
    late = LoraDenoiser(model.denoiser, RANK)  # on weights that are in half precision by now
    assert {p.dtype for p in learnable(late)} == {torch.float32}


class Seen(L.Callback):
    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.seen.append(pl_module)


def test_memory_counts_the_shared_weights_once():
    teacher, given = tiny.denoiser("unet2d"), classes(0, torch.arange(1))
    count = sum(p.numel() for p in teacher.parameters())
    lora = LoraDenoiser(teacher, RANK)
    own = sum(p.numel() for p in learnable(lora))
    found = memory_estimate(teacher, (3, 8, 8), given, num_steps=2, batch_size=1, lora_rank=RANK)
    assert (found.weights, found.trained, found.average) == (4 * count, 32 * own, 4 * own)
    assert weight_megabytes(teacher, lora, lora) == pytest.approx((4 * count + 36 * own) / 1e6)
