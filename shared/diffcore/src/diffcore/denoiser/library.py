"""Schedulers of the diffusers library, built from settings alone."""

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from diffcore.errors import MissingDependencyError


def built(class_name: str, settings: Mapping[str, Any]) -> Any:
    """Returns a scheduler of the library; settings that its class does not know are left out.

    Raises:
        MissingDependencyError: The library is not installed.
    """
    try:
        import diffusers
    except ImportError as error:
        raise MissingDependencyError(f"{error.name} is not installed; pip install 'diffcore[models]'") from error
    kind = getattr(diffusers, class_name)
    known = inspect.signature(kind.__init__).parameters
    with _quiet():
        return kind(**{key: value for key, value in settings.items() if key in known})


def spaced(class_name: str, settings: Mapping[str, Any], steps: int) -> Any:
    """Returns a scheduler of the library with its times set for a number of steps."""
    scheduler = built(class_name, settings)
    with _quiet():
        scheduler.set_timesteps(steps)
    return scheduler


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences what the library says about its own code: settings that it changes for its solver, deprecations."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
