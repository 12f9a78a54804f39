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

from diffcore.denoiser import GuidedDenoiser, NetworkDenoiser
from diffcore.errors import UserError
from diffcore.models import from_pipeline
from diffcore.runtime import Runtime
from diffcore.testing import tiny
from diffcore.train import EMA, fit, iterations_done
from emd_distill.chain import frozen
from emd_distill.distill import Settings, distill, student_of
from emd_distill.generator import OneStepGenerator
from emd_distill.lora import LoraDenoiser, learnable, lora_of
from emd_distill.losses import EMD
from emd_distill.module import DistillModule

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
    rates = {"learning_rate": 1e-2, "student_learning_rate": 1e-2}
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
    assert not (apart[0] & apart[1] or apart[0] & apart[2] or apart[1] & apart[2])
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
    """Rule 2 of specification 4.5 holds for a LoRA: nothing is kept for its gradients."""
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


def train_to(folder: Path, *callbacks: L.Callback) -> dict[str, dict[str, Tensor]]:
    told = settings()
    module, ema = module_of(tiny.model("unet2d"), told), EMA(0.9, network="generator")
    fit(
        module, steps=told.steps, folder=folder, runtime=CPU, callbacks=[ema, *callbacks],
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
