"""Populations with known answers, and a folder in which commands run."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore.cli import main
from w2w_space.app.cli import app
from w2w_space.layout import Layout
from w2w_space.population import Population, Stacked

LAYERS = {"blocks.10.to_q": (48, 64), "blocks.2.to_v": (40, 32), "mid.to_q": (56, 24)}


def names(count: int) -> tuple[str, ...]:
    return tuple(f"member {number}" for number in range(count))


@dataclass(frozen=True)
class Place:
    """A folder with what commands take, which is the current folder while a test runs.

    Attributes:
        folder: The folder.
        capsys: Output of the commands.
    """

    folder: Path
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *tokens: str | Path, code: int = 0) -> tuple[str, str]:
        """Runs a command, checks its exit code, and returns what it prints and what it tells."""
        self.capsys.readouterr()
        found = main(app, [str(token) for token in tokens])
        out, err = self.capsys.readouterr()
        assert found == code, err
        return out, err

    def json(self, *tokens: str | Path, code: int = 0) -> dict[str, Any]:
        """Runs a command and returns the object that it prints."""
        return json.loads(self(*tokens, "--json", code=code)[0])


@dataclass(frozen=True)
class Toy:
    """Adapters whose factors are affine functions of few latent numbers, written with whatever factors.

    Attributes:
        population: The adapters in one gauge, that of the functions.
        gauged: The same adapters, each module of each with a random gauge.
        latents: The latent numbers.
    """

    population: Population
    gauged: Population
    latents: Tensor


def toy(members: int = 200, latents: int = 6, rank: int = 1, spread: float = 1.0, seed: int = 0) -> Toy:
    g = torch.Generator().manual_seed(seed)
    layout = Layout.of(LAYERS, rank)
    u = torch.randn(members, latents, generator=g)
    rows, gauged = [], []
    for inputs, outputs in layout.sides:
        down, up = (
            torch.randn(latents + 1, *shape, generator=g) * torch.tensor([1.0] + [spread] * latents)[:, None, None]
            for shape in ((rank, inputs), (outputs, rank))
        )
        one = torch.cat([torch.ones(members, 1), u], 1)
        a, b = torch.einsum("nk,kri->nri", one, down), torch.einsum("nk,kor->nor", one, up)
        mixing = torch.randn(members, rank, rank, generator=g) + (2.0 * torch.eye(rank) if rank > 1 else 0.0)
        rows += [a.flatten(1), b.flatten(1)]
        gauged += [(mixing @ a).flatten(1), (b @ torch.linalg.inv(mixing)).flatten(1)]
    populations = [Population(layout, names(members), Stacked(torch.cat(parts, 1))) for parts in (rows, gauged)]
    return Toy(*populations, u)


@pytest.fixture(scope="session")
def rank_one() -> Toy:
    return toy()


@pytest.fixture(scope="session")
def rank_three() -> Toy:
    return toy(rank=3)
