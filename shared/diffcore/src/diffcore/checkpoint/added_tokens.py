"""Tokens that somebody added to a tokenizer, such as the placeholders of textual inversion. Imports no torch.

Several files of a folder may list them, and transformers does not read them all: a list in the configuration replaces
the others; without it, `added_tokens.json` and the list in `tokenizer.json` are merged. A token that would be left out,
and so be split into pieces, is an error here.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from diffcore.errors import printable
from diffcore.io.strictjson import StrictError

LISTED = "added_tokens_decoder"
"""The key of a tokenizer's configuration under which it lists its added tokens."""
_EXTRA = ("extra_special_tokens", "additional_special_tokens")
START, END = "<|startoftext|>", "<|endoftext|>"

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_OWN = {
    "CLIPTokenizer": re.compile(f"{re.escape(START)}|{re.escape(END)}"),
    "T5Tokenizer": re.compile(r"<pad>|</s>|<unk>|<extra_id_\d+>"),
}
_MOST, _LONGEST, _MOST_ROWS = 65_536, 512, 2**31


@dataclass(frozen=True)
class Added:
    """One added token.

    Attributes:
        content: The token as it stands in a prompt.
        number: Index of its row in the text encoder's embedding; None where the files leave that to the tokenizer.
        single_word: Whether the token matches only between word boundaries.
        lstrip: Whether the token swallows blanks on its left.
        rstrip: Whether the token swallows blanks on its right.
        normalized: Whether the token is searched in normalised text, which is lower case for CLIP.
        special: Whether decoding may leave the token out.
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
        """The options of matching, by name."""
        return {flag: getattr(self, flag) for flag in _FLAGS}

    def to_json(self) -> dict[str, Any]:
        """Returns the token as a JSON object."""
        return asdict(self)


def added_tokens(
    kind: str,
    settings: Mapping[str, Any],
    special: Mapping[str, Any],
    numbers: Mapping[str, Any],
    vocabulary: Any,
    pad: Any,
) -> tuple[Added, ...]:
    """Returns the tokens that a tokenizer has beyond those of its class: neither marks nor padding, in order of number.

    Args:
        kind: Class name of the tokenizer.
        settings: The content of `tokenizer_config.json`.
        special: The content of `special_tokens_map.json`.
        numbers: The content of `added_tokens.json`: numbers by token.
        vocabulary: The list of added tokens in `tokenizer.json`.
        pad: The padding token, which is left out.

    Raises:
        StrictError: A token is no text, has an impossible number or setting, or the files contradict each other.
    """

    def beyond(tokens: Iterable[Added]) -> dict[str, Added]:
        own = _OWN[kind]
        return {token.content: token for token in tokens if token.content != pad and not own.fullmatch(token.content)}

    listed = settings.get(LISTED, {})
    if not isinstance(listed, dict):
        raise StrictError(f"has {LISTED} that is no object")
    if not isinstance(vocabulary, list):
        raise StrictError("has a tokenizer.json whose added_tokens are no list")
    extra = list(_extra(settings))
    found = beyond(_added(value, number) for number, value in listed.items())
    for others in (
        beyond(_numbered(numbers, {token.content for token in extra})),
        beyond(_added(value, value.get("id") if isinstance(value, dict) else None) for value in vocabulary),
    ):
        for name, token in others.items():
            if name in found and found[name].number != token.number:
                raise StrictError(f"numbers the added token {_shown(name)} {found[name].number} and {token.number}")
            if LISTED in settings and name not in found:
                raise StrictError(
                    f"adds the token {_shown(name)}, which the tokenizer_config.json beside it does not list; "
                    "save the tokenizer again"
                )
        found = others | found if LISTED in settings else found | others
    found = beyond(extra or (() if LISTED in settings else _extra(special))) | found
    if len(found) > _MOST:
        raise StrictError(f"adds {len(found):,} tokens; the limit is {_MOST:,}")
    return tuple(sorted(found.values(), key=lambda token: _MOST_ROWS if token.number is None else token.number))


def _numbered(numbers: Mapping[str, Any], special: Collection[str]) -> Iterator[Added]:
    for name, number in numbers.items():
        yield _added({"content": name, "special": name in special, "normalized": name not in special}, number)


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
