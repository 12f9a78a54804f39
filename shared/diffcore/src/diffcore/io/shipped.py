"""The small trained models that come with diffcore: their names, and the folders that hold them. Needs no torch."""

from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Final

from diffcore.errors import ModelNotFoundError, printable

PREFIX: Final = "zoo:"

SHIPPED: Final = MappingProxyType(
    {
        "portraits-sd": "text-to-image portraits, 32x32: trained on ordinary captions only",
        "portraits-sd-memorised": "the same with 32 captions memorised, spread over the network as happens",
        "portraits-sd-planted": "the same memory, re-routed through known neurons",
        "portraits-oracle": "reads ten attributes off a portrait; features for Fréchet distances",
        "digits8-edm": "class-conditional 8x8 digits, EDM preconditioning",
        "digits8-classifier": "tells 8x8 digits apart; features for Fréchet distances",
        "digits-styles": "class-conditional 8x8 digits in all styles",
        "digits-styles-oracle": "reads the five style numbers off a digit",
    }
)
"""Name -> what it is, in a line."""


def shipped_folder(name: str) -> Path:
    """Returns the folder of a shipped model.

    Args:
        name: Name of the model, with or without the prefix `zoo:`.

    Raises:
        ModelNotFoundError: No shipped model has this name.
    """
    known = name.removeprefix(PREFIX)
    if known not in SHIPPED:
        raise ModelNotFoundError(f"the zoo has no {printable(known)}; it has: {', '.join(SHIPPED)}")
    folder = Path(str(files("diffcore") / "zoo" / "weights" / known))
    if not folder.is_dir():
        raise ModelNotFoundError(
            f"{known} is not in this installation of diffcore; train it with: diffcore zoo train {known}"
        )
    return folder
