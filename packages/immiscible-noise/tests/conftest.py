from collections.abc import Iterator

import pytest
from jaxtyping import config


@pytest.fixture
def as_shipped() -> Iterator[None]:
    """Turns the run-time shape checks of the test run off, so that our own messages are what a caller sees."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
