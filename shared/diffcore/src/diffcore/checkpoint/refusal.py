"""Errors of refused checkpoints: what was wrong, with which file, what to do."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from diffcore.errors import IncompatibleModelError, printable
from diffcore.io.strictjson import StrictError


def refusal(path: Path, what: str) -> IncompatibleModelError:
    """Returns the error for a refused file or folder; general advice is added where `what` gives none."""
    advice = "" if ";" in what else "; get a clean copy of the model"
    return IncompatibleModelError(f"{printable(path, 300)} {what}{advice}")


@contextmanager
def about(path: Path) -> Iterator[None]:
    """Turns a `StrictError` of the block into an error that names the file."""
    try:
        yield
    except StrictError as error:
        raise refusal(path, str(error)) from None


def custom_code(folder: Path, names: Mapping[str, int], source: Path, what: str) -> IncompatibleModelError:
    """Returns the error for a class that is not the libraries' own.

    Args:
        folder: The folder of the model.
        names: Files in it; the error names a Python file among them.
        source: The file that asks for the class.
        what: The class, or the key that asks for it.
    """
    script = next((name for name in names if name.endswith(".py")), None)
    if script is not None:
        return IncompatibleModelError(
            f"{printable(folder, 300)} contains Python code ({printable(script)}); "
            "diffcore never runs code from model folders"
        )
    return refusal(
        source, f"asks for {printable(what)}, a class of its own; diffcore never runs code from model folders"
    )
