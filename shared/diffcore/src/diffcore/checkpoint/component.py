"""One component of a model folder, read and checked: its configuration, its weight files, its vocabulary."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffcore.checkpoint.added_tokens import added_tokens
from diffcore.checkpoint.catalog import CONFIG_FILES, ROLES, SAME_CLASS, Role, current_class
from diffcore.checkpoint.configcheck import check_latents, cleaned, num_layers, refuse_code
from diffcore.checkpoint.inventory import Component
from diffcore.checkpoint.quantised import refuse_quantised
from diffcore.checkpoint.refusal import about, refusal
from diffcore.checkpoint.weightfiles import find_weights
from diffcore.io.strictjson import read_untrusted

TOKENIZER_BYTES = 64 * 2**20
_VOCABULARIES = {
    "CLIPTokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "T5Tokenizer": (("tokenizer.json",), ("spiece.model",)),
}


_TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")


def role_of(library: str, class_name: str) -> Role | None:
    """Returns the role of a class in a model; None for classes outside the tables of `catalog`."""
    if (library, class_name) == ("diffusers", "Transformer2DModel"):
        return "backbone"  # of DiT and PixArt, before they had classes of their own
    return ROLES.get((library, SAME_CLASS.get(class_name, class_name)))


def read_component(
    folder: Path,
    sizes: Mapping[str, int],
    name: str,
    library: str,
    class_name: str,
    *,
    allow_pickle: bool = False,
    config_only: bool = False,
) -> Component:
    """Reads a component whose class is in the tables of `catalog`.

    Args:
        folder: The component's own folder, with its files.
        sizes: Size in bytes of each file in the folder, by name.
        name: The component's key in the pipeline.
        library: The library that defines the class: diffusers or transformers.
        class_name: Class that the pipeline's index, or the configuration itself, states.
        allow_pickle: Whether pickled weights are accepted where there are no others.
        config_only: Whether weights are left out of the search.

    Raises:
        IncompatibleModelError: A file is missing, unsafe or broken, or the class is another.
    """
    role = role_of(library, class_name)
    assert role is not None  # callers look it up first
    if role == "tokenizer":
        return _read_tokenizer(folder, sizes, name, library, SAME_CLASS.get(class_name, class_name))
    config_path = folder / CONFIG_FILES[role]
    if config_path.name not in sizes:
        raise refusal(config_path, "is missing")
    raw = read_untrusted(config_path, infinite=role == "scheduler")
    class_name = _class_of(config_path, raw, class_name)
    with about(config_path):
        config, dropped = cleaned(raw, role, class_name)
    if role == "codec":
        with about(config_path):
            check_latents(config)
    component = Component(name, role, library, class_name, config, folder, dropped=dropped)
    if role == "scheduler" or config_only:
        return component
    headers, pickles, variant = find_weights(folder, sizes, library, allow_pickle=allow_pickle)
    for header in headers:
        refuse_quantised(header)
    count = sum(len(header.tensors) for header in headers)
    if headers and num_layers(config) > count:
        raise refusal(config_path, f"asks for {num_layers(config)} layers or more, but there are {count} tensors")
    return component.with_weights(headers, pickles, variant)


def _class_of(config_path: Path, config: Mapping[str, Any], expected: str) -> str:
    """Returns the current name of the class, after checking that configuration and index agree."""
    own = config.get("_class_name", expected)
    if not isinstance(own, str):
        raise refusal(config_path, "has a _class_name that is not text; diffcore never runs code from model folders")
    named, wanted = current_class(own, config), current_class(expected, config)
    if named != wanted or named == "Transformer2DModel":
        raise refusal(config_path, f"is of class {own[:60]!r}, where {expected[:60]!r} is expected")
    return named


def _read_tokenizer(folder: Path, sizes: Mapping[str, int], name: str, library: str, kind: str) -> Component:
    vocabulary = next((group for group in _VOCABULARIES[kind] if all(file in sizes for file in group)), None)
    if vocabulary is None:
        wanted = " or ".join(" + ".join(group) for group in _VOCABULARIES[kind])
        raise refusal(folder, f"has no vocabulary ({wanted})")
    own, special = (_tokenizer_settings(folder, sizes, file) for file in _TOKENIZER_SETTINGS)
    # Older folders correct their padding in the map of special tokens; newer ones say all in one file.
    merged = special | own if "added_tokens_decoder" in own else own | special
    config = {key: merged[key] for key in ("pad_token", "model_max_length") if key in merged}
    pad = config.get("pad_token")
    pad = pad.get("content") if isinstance(pad, dict) else pad
    files = tuple(folder / file for file in vocabulary)
    for file in files:
        if sizes[file.name] > TOKENIZER_BYTES:
            raise refusal(file, f"has {sizes[file.name]:,} bytes; the limit is {TOKENIZER_BYTES:,}")
    numbers = _tokenizer_settings(folder, sizes, "added_tokens.json")
    whole = {}
    if vocabulary == ("tokenizer.json",):
        whole = read_untrusted(files[0], max_bytes=TOKENIZER_BYTES, parse_int=_short)
    with about(folder):
        added = added_tokens(kind, own, special, numbers, whole.get("added_tokens") or [], pad)
    return Component(name, "tokenizer", library, kind, config, folder, files=files, added=added)


def _tokenizer_settings(folder: Path, sizes: Mapping[str, int], file: str) -> dict[str, Any]:
    if file not in sizes:
        return {}
    content = read_untrusted(folder / file, parse_int=_short)
    with about(folder / file):
        refuse_code(content)
    return content


def _short(text: str) -> int:
    """Reads an integer cut to 40 digits: tokenizers without a limit state a length of 1e30."""
    return int(text[:40])
