import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from nemo_localize.planted import Plant, Planted, hard_case, ordinary_captions, planted_model
from nemo_localize.statistics import Statistics, collect_statistics

TRIGGER = "portrait of 1917 no 1"
TAU = 0.45


@pytest.fixture(scope="session")
def plain() -> ModuleType:
    """The sequential reference under benchmarks/."""
    path = Path(__file__).parents[3] / "benchmarks" / "nemo_reference.py"
    spec = importlib.util.spec_from_file_location("nemo_reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["nemo_reference"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def simple() -> Planted:
    """One neuron that stands out by 8."""
    return planted_model([Plant(TRIGGER, 0, 3)])


@pytest.fixture(scope="session")
def hard() -> Planted:
    """One neuron that stands out less than six innocent ones."""
    return hard_case()[0]


@pytest.fixture(scope="session")
def usual(simple: Planted) -> Statistics:
    """Statistics of the simple model."""
    return statistics_of(simple)


def statistics_of(planted: Planted) -> Statistics:
    return collect_statistics(planted.model, ordinary_captions(200, seed=3))


@pytest.fixture(scope="session")
def collect():
    """Statistics of any planted model."""
    return statistics_of


@pytest.fixture(scope="session")
def leaky() -> Planted:
    """Two captions that show one picture, each through a neuron of its own."""
    return planted_model([Plant(TRIGGER, 0, 3), Plant("some other thing 42", 1, 4)], side=8)
