"""Finding the weight files of a component folder, with variants and shards. Imports no torch."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from diffcore.checkpoint.catalog import WEIGHT_STEMS
from diffcore.errors import IncompatibleModelError, printable
from diffcore.io.strictjson import read_untrusted
from diffcore.io.tensorfile import TensorHeader, read_header, refusal_of_pickle

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")
_PREFERRED = (None, "fp32", "fp16", "bf16")  # the most exact first


def find_weights(
    folder: Path, names: Iterable[str], library: str, *, allow_pickle: bool = False
) -> tuple[list[TensorHeader], list[Path], str | None]:
    """Returns checked headers of the weight files, pickles instead where allowed, and the variant chosen.

    Args:
        folder: The component's folder, for paths and messages.
        names: Names of the files in it.
        library: The library whose naming they follow.
        allow_pickle: Whether a lone `.bin` file is accepted.

    Raises:
        IncompatibleModelError: There are no weights, only pickles, or they break a rule.
    """
    names = set(names)
    stem = WEIGHT_STEMS[library]
    variants = _variants(names, library)
    if not variants:
        pickle = next((folder / name for name in (f"{stem}.bin", "pytorch_model.bin") if name in names), None)
        if pickle is not None and allow_pickle:
            return [], [pickle], None
        if any(name.endswith(PICKLE_SUFFIXES) for name in names):
            first = min(name for name in names if name.endswith(PICKLE_SUFFIXES))
            raise IncompatibleModelError(refusal_of_pickle(folder / first))
        raise IncompatibleModelError(f"{printable(folder, 300)} holds no {stem}.safetensors; download the model again")
    known = [variant for variant in _PREFERRED if variant in variants]
    if not known and len(variants) > 1:
        raise IncompatibleModelError(
            f"{printable(folder, 300)} holds the variants {', '.join(map(printable, sorted(map(str, variants))))}; "
            "keep one of them"
        )
    variant = known[0] if known else next(iter(variants))
    return _headers(folder, names, variants[variant]), [], variant


def _variants(names: set[str], library: str) -> dict[str | None, str]:
    """Returns one file by variant: the weights themselves, or the index of their shards.

    Where a variant has both, each library takes its own: diffusers the shards, transformers the whole file.
    """
    stem, variant = WEIGHT_STEMS[library], r"(?P<variant>[\w-]+)"
    whole = rf"{stem}(?:\.{variant})?\.safetensors"
    unknown_to_both = rf"{whole}\.index\.json"
    indices = (rf"{stem}\.safetensors\.{variant}\.index\.json", rf"{stem}\.safetensors\.index(?:\.{variant})?\.json")
    patterns = (whole, *indices) if library == "diffusers" else (*indices, whole)
    found: dict[str | None, str] = {}
    for pattern in (unknown_to_both, *patterns):  # the last one stays
        for name in sorted(names):
            if match := re.fullmatch(pattern, name):
                kind = match["variant"]
                if kind is None or not re.fullmatch(r".*-?\d{5}-of-\d{5}", kind):
                    found[kind] = name
    return found


def _headers(folder: Path, names: set[str], first: str) -> list[TensorHeader]:
    if first.endswith(".safetensors"):
        return [read_header(folder / first)]
    path = folder / first
    weight_map = read_untrusted(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _refusal(path, "has no weight_map")
    shards = list(dict.fromkeys(weight_map.values())) if all(isinstance(v, str) for v in weight_map.values()) else []
    if not shards:
        raise _refusal(path, "names files that are not text")
    for shard in shards:
        if not _PLAIN.fullmatch(shard):
            raise _refusal(path, f"names {printable(shard)!r}, which is no safetensors file of its folder")
    missing = sorted(set(shards) - names)
    if missing:
        raise _refusal(path, f"names shards that are not there: {', '.join(map(printable, missing[:10]))}")
    headers = [read_header(folder / shard) for shard in shards]
    _check_shards(path, weight_map, headers)
    return headers


def _check_shards(path: Path, weight_map: Mapping[str, str], headers: list[TensorHeader]) -> None:
    seen: dict[str, str] = {}
    for header in headers:
        for name in header.tensors:
            if name in seen:
                raise _refusal(path, f"has tensor {printable(name)!r} in {seen[name]} and in {header.path.name}")
            seen[name] = header.path.name
    for name, shard in weight_map.items():
        if seen.get(name) != shard:
            raise _refusal(path, f"says tensor {printable(name)!r} is in {shard}, which lacks it")
    if len(seen) > len(weight_map):
        extra = next(name for name in seen if name not in weight_map)
        raise _refusal(path, f"does not name tensor {printable(extra)!r} of {seen[extra]}")


def _refusal(path: Path, what: str) -> IncompatibleModelError:
    return IncompatibleModelError(f"{printable(path, 300)} {what}; get a complete copy of the model")
