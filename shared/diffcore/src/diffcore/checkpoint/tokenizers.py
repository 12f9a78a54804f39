"""Building tokenizers from the vocabularies in model folders; no vocabulary is shipped here.

They are built from the entries and the added tokens alone; all other content of a tokenizer file (patterns, scripts,
other classes) is ignored.
"""

import base64
import binascii
import gzip
import importlib.util
from pathlib import Path
from typing import Any

from diffcore.checkpoint.added_tokens import END, START, Added
from diffcore.checkpoint.component import TOKENIZER_BYTES
from diffcore.checkpoint.inventory import Component
from diffcore.checkpoint.sentencepiece import read_pieces
from diffcore.errors import IncompatibleModelError, printable
from diffcore.io.strictjson import StrictError, parse, read_limited

_CLIP_MERGES = 49_152 - 256 - 2  # of the published vocabulary, whose file holds more


def build_tokenizer(component: Component, *, pad_token: str | None = None) -> Any:
    """Returns the tokenizer of a component, of the transformers library.

    Args:
        component: Vocabulary files and settings of the tokenizer.
        pad_token: Padding token that replaces the one in the settings.

    Raises:
        IncompatibleModelError: Its vocabulary is not one of this kind of tokenizer, or the library would give an added
            token another number than the files.
    """
    first = component.files[0]
    try:
        tokenizer = _clip(component, pad_token) if component.class_name == "CLIPTokenizer" else _t5(component)
        _add(tokenizer, component.added)
    except StrictError as error:
        raise IncompatibleModelError(f"{printable(first, 300)} {error}; get a clean copy of the tokenizer") from None
    return tokenizer


def installed_clip_tokenizer(pad_token: str) -> Any | None:
    """Returns CLIP's tokenizer from the vocabulary file of an installed open_clip_torch; None without one."""
    found = importlib.util.find_spec("open_clip")
    places = list(found.submodule_search_locations or ()) if found else []
    file = next((p for place in places if (p := Path(place) / "bpe_simple_vocab_16e6.txt.gz").is_file()), None)
    if file is None:
        return None
    lines = gzip.decompress(file.read_bytes()).decode().split("\n")[1 : 1 + _CLIP_MERGES]
    merges = [_pair(line) for line in lines]
    letters = byte_letters()
    entries = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    return _clip_tokenizer({entry: index for index, entry in enumerate(entries)}, merges, pad_token, 77)


def byte_letters() -> list[str]:
    """Returns the 256 printable letters that stand for bytes in byte-level vocabularies, in CLIP's order."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(plain)
    return [chr(byte) for byte in plain] + [chr(256 + index) for index in range(others)]


def last_number(tokenizer: Any) -> int:
    """Returns the largest token number of a tokenizer; gaps among added tokens make it exceed their count."""
    return max(tokenizer.get_vocab().values())


def _add(tokenizer: Any, tokens: tuple[Added, ...]) -> None:
    """Adds tokens in order of their numbers; the library numbers them from the end of the vocabulary on."""
    if not tokens:
        return
    from transformers import AddedToken

    tokenizer.add_tokens([AddedToken(token.content, **token.flags) for token in tokens])
    for token in tokens:
        number = tokenizer.convert_tokens_to_ids(token.content)
        if token.number not in (None, number):
            raise StrictError(
                f"stands beside the added token {printable(token.content, 40)!r} with the number {token.number}, to "
                f"which transformers gives {number}"
            )
    normalizer = tokenizer.backend_tokenizer.normalizer
    alike: dict[str, str] = {}
    for token in tokens:
        if normalizer is not None and token.normalized:
            other = alike.setdefault(normalizer.normalize_str(token.content), token.content)
            if other != token.content:  # the library then takes either, by chance
                one, two = printable(other, 40), printable(token.content, 40)
                raise StrictError(f"adds the tokens {one!r} and {two!r}, which are one after normalisation; keep one")


def _clip(component: Component, pad_token: str | None) -> Any:
    vocabulary, merges = _bpe_json(component.files[0]) if len(component.files) == 1 else _bpe_pair(component.files)
    if not {START, END} <= vocabulary.keys():
        raise StrictError(f"lacks {START} or {END}, which every vocabulary of CLIP has")
    joined = {"".join(pair) for pair in merges}
    if not joined <= vocabulary.keys():
        raise StrictError(f"has merges that lead to no entry, such as {printable(min(joined - vocabulary.keys()))!r}")
    pad = component.config.get("pad_token", END) if pad_token is None else pad_token
    pad = pad.get("content") if isinstance(pad, dict) else pad
    if not isinstance(pad, str) or pad not in vocabulary:
        raise StrictError(f"lacks the padding token {printable(pad)!r}")
    length = component.config.get("model_max_length", 77)
    length = length if isinstance(length, int) and 2 < length <= 4096 else 77
    return _clip_tokenizer(vocabulary, merges, pad, length)


def _clip_tokenizer(vocabulary: dict[str, int], merges: list[tuple[str, str]], pad: str, length: int) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad, model_max_length=length)  # pyright: ignore[reportArgumentType]


def _bpe_json(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = _object(path).get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise StrictError("holds no byte-pair vocabulary")
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise StrictError("holds no merges")
    return _vocabulary(model.get("vocab")), [_pair(merge) for merge in merges]


def _bpe_pair(paths: tuple[Path, ...]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    vocabulary, merges = paths
    try:
        lines = read_limited(merges, TOKENIZER_BYTES).decode().split("\n")
    except UnicodeDecodeError:
        raise StrictError("is accompanied by merges that are not UTF-8") from None
    return _vocabulary(_object(vocabulary)), [_pair(line) for line in lines if line.strip() and line[:9] != "#version:"]


def _vocabulary(value: Any) -> dict[str, int]:
    if not isinstance(value, dict) or not value:
        raise StrictError("holds no vocabulary")
    if not all(type(index) is int and 0 <= index < len(value) for index in value.values()):
        raise StrictError("numbers its entries otherwise than from 0 on")
    if len(set(value.values())) < len(value):
        raise StrictError("gives two entries one number")
    return value


def _pair(merge: Any) -> tuple[str, str]:
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not (isinstance(parts, list) and len(parts) == 2 and all(isinstance(part, str) and part for part in parts)):
        raise StrictError(f"holds the merge {printable(merge)!r}, which is no pair")
    return parts[0], parts[1]


def _t5(component: Component) -> Any:
    from transformers import T5Tokenizer

    path = component.files[0]
    if path.suffix == ".model":
        pieces, charsmap = read_pieces(read_limited(path, TOKENIZER_BYTES))
    else:
        pieces, charsmap = _unigram_json(path)
    if [piece for piece, _ in pieces[:3]] != ["<pad>", "</s>", "<unk>"]:
        raise StrictError("does not begin with <pad>, </s> and <unk>, as every vocabulary of T5 does")
    known = {piece for piece, _ in pieces}
    # Published vocabularies leave the sentinels out; the tokenizer counts them all the same.
    pieces += [(name, 0.0) for index in range(99, -1, -1) if (name := f"<extra_id_{index}>") not in known]
    return T5Tokenizer(vocab=pieces, _spm_precompiled_charsmap=charsmap)


def _unigram_json(path: Path) -> tuple[list[tuple[str, float]], bytes | None]:
    content = _object(path)
    model, normalizer = content.get("model"), content.get("normalizer")
    if not isinstance(model, dict) or model.get("type") != "Unigram" or not isinstance(model.get("vocab"), list):
        raise StrictError("holds no unigram vocabulary")
    pieces = []
    for entry in model["vocab"]:
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)) or isinstance(
            entry[1], bool
        ):
            raise StrictError(f"holds the entry {printable(entry)!r}, which is no text with a score")
        if not isinstance(entry[1], int | float):
            raise StrictError(f"holds the score {printable(entry[1])!r}, which is no number")
        pieces.append((entry[0], float(entry[1])))
    parts = normalizer.get("normalizers", [normalizer]) if isinstance(normalizer, dict) else []
    maps = [part.get("precompiled_charsmap") for part in parts if isinstance(part, dict)]
    text = next((found for found in maps if isinstance(found, str)), None)
    try:
        return pieces, base64.b64decode(text, validate=True) if text else None
    except binascii.Error:
        raise StrictError("holds a character map that is not base64") from None


def _object(path: Path) -> dict[str, Any]:
    value = parse(read_limited(path, TOKENIZER_BYTES))
    if not isinstance(value, dict):
        raise StrictError("holds no object")
    return value
