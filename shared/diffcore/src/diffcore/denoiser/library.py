"""Classes of the diffusers library, without what they say on the way: schedulers from settings alone, pipelines."""

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
    kind = library_class(class_name)
    known = inspect.signature(kind.__init__).parameters
    with _quiet():
        return kind(**{key: value for key, value in settings.items() if key in known})


def library_class(name: str) -> Any:
    """Returns a class of the library; pipelines import image processors, which warn of an absent torchvision.

    Raises:
        MissingDependencyError: The library is not installed.
    """
    try:
        import diffusers
        from transformers.utils import logging
    except ImportError as error:
        raise MissingDependencyError(f"{error.name} is not installed; pip install 'diffcore[models]'") from error
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return getattr(diffusers, name)
    finally:
        logging.set_verbosity(before)


def spaced(class_name: str, settings: Mapping[str, Any], steps: int) -> Any:
    """Returns a scheduler of the library with its times set for a number of steps."""
    scheduler = built(class_name, settings)
    with _quiet():
        scheduler.set_timesteps(steps)
    return scheduler


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences warnings of diffusers about its own code, such as deprecations."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
