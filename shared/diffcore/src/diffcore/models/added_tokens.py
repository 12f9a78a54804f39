"""Tokens that somebody added to a tokenizer, such as the placeholders of textual inversion. Imports no torch.

They lie in several files of a folder, and transformers reads some of them only: what the configuration lists stands
alone; without such a list, `added_tokens.json` and the list in `tokenizer.json` are taken together. A token that would
so be left out, and fall into pieces, is an error here.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from diffcore.errors import printable
from diffcore.strictjson import StrictError

LISTED = "added_tokens_decoder"
"""The key of a tokenizer's configuration under which it lists its added tokens."""
_EXTRA = ("extra_special_tokens", "additional_special_tokens")
START, END = "<|startoftext|>", "<|endoftext|>"

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_OWN = re.compile(re.escape(START) + "|" + re.escape(END) + r"|<pad>|</s>|<unk>|<extra_id_\d+>")
_MOST, _LONGEST, _MOST_ROWS = 65_536, 512, 2**31


@dataclass(frozen=True)
class Added:
    """One added token.

    Attributes:
        content: Its text.
        number: Of its row in the text encoder; None where the files leave that to the tokenizer.
        single_word: Whether it is found only between word boundaries.
        lstrip: Whether it swallows blanks on its left.
        rstrip: Whether it swallows blanks on its right.
        normalized: Whether it is looked for in the text after normalisation, in lower case for CLIP.
        special: Whether decoding may leave it out.
    """

    content: str
    number: int | None = None
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False

    @property
    def flags(self) -> dict[str, bool]:
        """How it is looked for."""
        return {flag: getattr(self, flag) for flag in _FLAGS}

    def to_json(self) -> dict[str, Any]:
        """Returns plain values."""
        return asdict(self)


def added_tokens(
    settings: Mapping[str, Any], numbers: Mapping[str, Any], vocabulary: Any, pad: Any
) -> tuple[Added, ...]:
    """Returns the tokens that a tokenizer has beyond those of its class: neither marks nor padding, in order of number.

    Args:
        settings: Of `tokenizer_config.json` and `special_tokens_map.json` together.
        numbers: Of `added_tokens.json`.
        vocabulary: What `tokenizer.json` lists.
        pad: The padding token.

    Raises:
        StrictError: A token is no text, has an impossible number or setting, or the files contradict each other.
    """
    extra = list(_extra(settings))
    special = {token.content for token in extra}
    listed = settings.get(LISTED, {})
    if not isinstance(listed, dict):
        raise StrictError(f"has {LISTED} that is no object")
    if not isinstance(vocabulary, list):
        raise StrictError("has a tokenizer.json whose added_tokens are no list")
    found = {token.content: token for token in (_added(value, number) for number, value in listed.items())}
    others = [
        _added({"content": name, "special": name in special, "normalized": name not in special}, number)
        for name, number in numbers.items()
    ]
    others += [_added(value, value.get("id") if isinstance(value, dict) else None) for value in vocabulary]
    for token in filter(lambda token: _is_beyond_class(token, pad), others):
        known = found.get(token.content)
        if known is not None and known.number != token.number:
            raise StrictError(f"numbers the added token {_shown(token.content)} {known.number} and {token.number}")
        if LISTED not in settings:
            found[token.content] = token
        elif known is None:
            raise StrictError(
                f"adds the token {_shown(token.content)}, which the tokenizer_config.json beside it does not list; "
                "save the tokenizer again"
            )
    found |= {token.content: token for token in extra if token.content not in found}
    beyond = [token for token in found.values() if _is_beyond_class(token, pad)]
    if len(beyond) > _MOST:
        raise StrictError(f"adds {len(beyond):,} tokens; the limit is {_MOST:,}")
    return tuple(sorted(beyond, key=lambda token: _MOST_ROWS if token.number is None else token.number))


def _is_beyond_class(token: Added, pad: Any) -> bool:
    return token.content != pad and not _OWN.fullmatch(token.content)


def _extra(settings: Mapping[str, Any]) -> Iterator[Added]:
    values = next((settings[key] for key in _EXTRA if settings.get(key)), [])
    if isinstance(values, dict):
        values = list(values.values())
    if not isinstance(values, list):
        raise StrictError("has extra special tokens that are no list")
    for value in values:
        yield _added({**(value if isinstance(value, dict) else {"content": value}), "special": True}, None)


def _added(value: Any, number: Any) -> Added:
    content = value.get("content") if isinstance(value, dict) else None
    if not isinstance(content, str) or not 0 < len(content) <= _LONGEST or not _is_unicode(content):
        raise StrictError(f"adds the token {_shown(content)}, which is no text of 1 to {_LONGEST} characters")
    flags = {flag: value[flag] for flag in _FLAGS if flag in value}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise StrictError(f"adds the token {_shown(content)} with settings that are neither true nor false")
    if "normalized" not in flags and flags.get("special"):
        flags["normalized"] = False
    if isinstance(number, str) and number.isascii() and number.isdigit() and len(number) < 10:
        number = int(number)
    if number is not None and (type(number) is not int or not 0 <= number < _MOST_ROWS):
        raise StrictError(f"gives the added token {_shown(content)} the number {printable(number, 40)}")
    return Added(content, number, **flags)


def _shown(content: Any) -> str:
    return repr(printable(content, 40))


def _is_unicode(text: str) -> bool:
    return not any(0xD800 <= ord(letter) < 0xE000 for letter in text)
