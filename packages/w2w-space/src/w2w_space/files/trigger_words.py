"""The words that an adapter was trained with, as kohya's trainer keeps them in the header of a file."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from diffcore.adapters import scan_adapter
from diffcore.errors import printable
from diffcore.io.strictjson import StrictError, parse

_TAGS = "ss_tag_frequency"
_SHOWN = 8


def trigger_words(path: Path | str) -> list[str]:
    """Returns the commonest tags of the captions that an adapter was trained with, the most frequent first.

    Args:
        path: File, or folder in PEFT's layout.
    """
    text = scan_adapter(path).header.metadata.get(_TAGS)
    if text is None:
        return []
    try:
        folders = parse(text.encode())
    except StrictError:
        return []
    counts = Counter[str]()
    for tags in folders.values() if isinstance(folders, Mapping) else ():
        if isinstance(tags, Mapping):
            counts.update({printable(tag.strip()): n for tag, n in tags.items() if isinstance(n, int) and n > 0})
    return [tag for tag, _ in counts.most_common(_SHOWN)]
