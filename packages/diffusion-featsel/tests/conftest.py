"""Fixtures of all tests of diffusion-featsel."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import diffcore.testing.real_configs
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
