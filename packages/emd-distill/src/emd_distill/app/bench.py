"""Benchmark cases: the chain and a whole step against a straightforward form in PyTorch, on a small U-Net."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffcore.bench import Case
from diffcore.denoiser import Condition, GuidedDenoiser, NetworkDenoiser
from diffcore.models import load
from diffcore.runtime import Runtime
from emd_distill.chain import ChainNoise, langevin_eps_z
from emd_distill.distill import sampled, situation, student_loss
from emd_distill.draws import Draws
from emd_distill.generator import OneStepGenerator
from emd_distill.losses import EMD
from emd_distill.noise_levels import noise_levels

_GAMMA_E, _GAMMA_Z, _KAPPA, _SCALE = 0.16, 0.01, 0.25, 2.0


def cases(*, smoke: bool = False) -> list[Case]:
    """Returns the benchmark of this package.

    Args:
        smoke: Take few rows and steps, for a check of agreement only.
    """
    rows, steps = (2, 2) if smoke else (16, 16)
    networks = _Networks("zoo:digits8-edm", 2.5, classes)
    return [
        _chain(networks, rows, steps, "U-Net of 8 x 8 pixels"),
        _chain(_Networks("zoo:portraits-sd", 625.0, one_prompt), rows, min(steps, 4), "U-Net of 8 x 16 x 16 latents"),
        _eps_alone(networks, rows, steps),
        _step(networks, rows, steps),
    ]


class _Networks:
    """Teacher, student and generator of one architecture, that of a model of the zoo.

    Args:
        name: Model that is the teacher.
        level: Noise level that the generator is called at.
        conditions: Function from the iteration and the rows to the conditions.
    """

    def __init__(self, name: str, level: float, conditions: Callable[[int, Tensor], Condition]) -> None:
        model = load(name, Runtime(device="cpu"))
        self.conditions = conditions
        self.teacher: NetworkDenoiser = model.denoiser
        self.shape = tuple(model.shape)
        self.student = copy.deepcopy(self.teacher).requires_grad_(True)
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():  # a student that differs from the teacher, as in training
            for part in self.student.parameters():
                part.add_(0.02 * part.std(correction=0) * torch.randn(part.shape, generator=g))
        self.generator = OneStepGenerator(copy.deepcopy(self.teacher).requires_grad_(True), level)
        self.teacher.requires_grad_(False)

    def draws(self) -> Draws:
        return Draws(0, self.shape, noise_levels(self.teacher.schedule, mean=-1.0), self.conditions)


def classes(step: int, rows: Tensor) -> Condition:
    """Returns the class of each row, in turn."""
    return {"class_labels": (rows + step) % 10}


def one_prompt(step: int, rows: Tensor) -> Condition:
    """Returns an embedding in the shape of a prompt's, the same for all rows."""
    embedding = torch.randn(1, 8, 128, generator=torch.Generator().manual_seed(0))
    return {"encoder_hidden_states": embedding.expand(len(rows), -1, -1)}


def _chain(networks: _Networks, rows: int, steps: int, name: str) -> Case:
    """A chain in eps and z: the generator's weights are constants, against autograd through all of it."""
    draws, index = networks.draws(), torch.arange(rows)
    drawn, noise = draws(0, index), draws.chain(0, index, steps, moves=True)

    def ours() -> Tensor:
        parts = networks.generator, networks.teacher, networks.student, drawn.z, drawn.eps, drawn.t, drawn.condition
        return langevin_eps_z(*parts, gamma_e=_GAMMA_E, gamma_z=_GAMMA_Z, kappa=_KAPPA, noise=noise).u

    def theirs() -> Tensor:
        return plain_chain(networks.generator, networks.teacher, networks.student, drawn, noise)[1]

    sizes = {"rows": rows, "steps": steps, "network": name}
    return Case("a chain in eps and z, against autograd with weights", sizes, ours, theirs, close, 1.15, 2.0)


def _eps_alone(networks: _Networks, rows: int, steps: int) -> Case:
    """A chain in eps alone, which needs no gradient, against one in eps and z."""
    draws, index = networks.draws(), torch.arange(rows)
    drawn, noise = draws(0, index), draws.chain(0, index, steps, moves=True)
    parts = networks.generator, networks.teacher, networks.student, drawn.z, drawn.eps, drawn.t, drawn.condition

    def run(gamma_z: float) -> Tensor:
        return langevin_eps_z(*parts, gamma_e=_GAMMA_E, gamma_z=gamma_z, kappa=_KAPPA, noise=noise).u

    def agree(one: Tensor, other: Tensor) -> bool:
        return bool(one.isfinite().all() & other.isfinite().all())  # two chains, whose costs are compared

    sizes = {"rows": rows, "steps": steps}
    return Case(
        "a chain in eps alone, against eps and z", sizes, lambda: run(0.0), lambda: run(_GAMMA_Z), agree, 1 / 0.6
    )


def _step(networks: _Networks, rows: int, steps: int) -> Case:
    """A whole iteration with a guided teacher: one call of both conditions, against one network call after another."""
    draws, index = networks.draws(), torch.arange(rows)
    uncond = {"class_labels": torch.tensor([0])}
    guided = GuidedDenoiser(networks.teacher, _SCALE, uncond)
    loss = EMD(num_steps=steps, gamma_e=_GAMMA_E, gamma_z=_GAMMA_Z, kappa=_KAPPA)
    noise = draws.chain(0, index, steps, moves=True)

    def ours() -> Tensor:
        drawn, x0 = sampled(networks.generator, draws, 0, index)
        student_loss(networks.student, x0, drawn).backward()
        networks.student.zero_grad()
        told = loss(situation(networks.generator, guided, networks.student, x0, drawn, draws, 0, index))
        told.loss.backward()
        return _gradient(networks.generator)

    def theirs() -> Tensor:
        drawn = draws(0, index)
        x0 = networks.generator(drawn.z, drawn.condition).detach()
        student_loss(networks.student, x0, drawn).backward()
        networks.student.zero_grad()
        z, u = plain_chain(networks.generator, networks.teacher, networks.student, drawn, noise, uncond)
        y = networks.generator(z, drawn.condition)
        (0.5 * (y - (y + u).detach()).square().mean()).backward()
        return _gradient(networks.generator)

    sizes = {"rows": rows, "steps": steps, "guidance": str(_SCALE)}
    return Case("an iteration with a guided teacher, against one call after another", sizes, ours, theirs, close, 1.2)


def plain_chain(
    generator: Any, teacher: Any, student: Any, drawn: Any, noise: ChainNoise, uncond: Condition | None = None
) -> tuple[Tensor, Tensor]:
    """Returns z and u of a chain, written as the formulas read: the reference of the cases above.

    Args:
        generator: One-step generator, whose weights get gradients on the way.
        teacher: Denoiser of the teacher without guidance.
        student: Denoiser of the student score.
        drawn: Draws of an iteration.
        noise: Noise of the chain's steps.
        uncond: Condition without a class, for guidance in a call of its own; None for none.
    """
    alpha, sigma = (level.view(-1, 1, 1, 1) for level in teacher.schedule.alpha_sigma(drawn.t))
    ratio = sigma / alpha
    step = _GAMMA_Z * ratio**2 / (ratio**2 + _KAPPA)
    z, eps, ledger = drawn.z, drawn.eps, drawn.eps
    for place in range(noise.eps.shape[1]):
        z = z.detach().requires_grad_()
        y = generator(z, drawn.condition)
        x = alpha * y.detach() + sigma * eps
        with torch.no_grad():
            theirs = teacher(x, drawn.t, drawn.condition).noise
            if uncond is not None:
                rows = {key: value.expand(len(x)) for key, value in uncond.items()}
                without = teacher(x, drawn.t, rows).noise
                theirs = without + _SCALE * (theirs - without)
            drift = student(x, drawn.t, drawn.condition).noise - theirs
        y.backward(alpha / sigma * drift)
        assert z.grad is not None
        assert noise.z is not None
        injected = math.sqrt(2 * _GAMMA_E) * noise.eps[:, place]
        z = (1 - step) * z.detach() + step * z.grad + (2 * step).sqrt() * noise.z[:, place]
        eps = (1 - _GAMMA_E) * eps + _GAMMA_E * drift + injected
        ledger = (1 - _GAMMA_E) * ledger + injected
    generator.zero_grad()
    return z, ratio * (eps - ledger)


def close(one: Tensor, other: Tensor) -> bool:
    """Returns whether two results are equal up to rounding, relative to their size."""
    return float((one - other).norm() / other.norm()) < 1e-3


def _gradient(network: Any) -> Tensor:
    found = torch.cat([part.grad.flatten() for part in network.parameters() if part.grad is not None])
    network.zero_grad()
    return found
