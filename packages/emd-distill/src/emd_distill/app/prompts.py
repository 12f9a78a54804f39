"""Reading files of prompts, and saying what was left out of them."""

import logging
from pathlib import Path

from diffcore.data.prompts import PromptSet, load_prompts

_LOG = logging.getLogger("diffcore.emd_distill")


def read_prompts(path: Path) -> PromptSet:
    """Reads prompts, and warns of lines that are left out.

    Args:
        path: File of prompts, one a line.

    Raises:
        UserError: There is no usable prompt, or the file has another format.
    """
    found = load_prompts(path)
    for note in found.notes:
        _LOG.warning("%s", note)
    return found
