"""Fixtures of all tests of diffusion-featsel."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import diffcore.testing.real_configs
from diffcore.denoiser import NetworkDenoiser
from diffcore.models import DiffusionModel, backbone_call
from diffcore.testing import tiny
from diffusion_featsel.inventory import Inventory, inventory_of_config

REAL = Path(diffcore.testing.real_configs.__file__).parent


@pytest.fixture(scope="session")
def real_config() -> Callable[[str], dict[str, Any]]:
    """Returns the published configuration of a backbone: sd15, sd21, sdxl, pixart-alpha, sd3 or flux-dev."""

    def read(name: str) -> dict[str, Any]:
        part = next(part for part in ("unet", "transformer") if (REAL / name / part).is_dir())
        return json.loads((REAL / name / part / "config.json").read_text("utf-8"))

    return read


@pytest.fixture(scope="session")
def real_inventory(real_config: Callable[[str], dict[str, Any]]) -> Callable[[str], Inventory]:
    """Returns the inventory of a published backbone at the size it was trained for."""
    return cache(lambda name: inventory_of_config(real_config(name)))


@pytest.fixture(scope="session")
def model_of() -> Callable[..., DiffusionModel]:
    """Returns a function that puts a backbone into the tiny model of its family."""

    def build(name: str, backbone: Any) -> DiffusionModel:
        model = tiny.model(name)
        call = None if isinstance(backbone, torch._dynamo.OptimizedModule) else backbone_call(backbone)
        kind, schedule = model.denoiser.prediction_type, model.denoiser.schedule
        return replace(model, denoiser=NetworkDenoiser(backbone, schedule, kind, call=call))

    return build
