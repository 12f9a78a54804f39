"""Sites, which name a tensor in a network, and the patterns that find modules by name."""

import difflib
import glob
import heapq
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from diffcore.errors import NoMatchError, printable

_AT = re.compile(r"input|output(\[\d+\])*")
# Wrappers that change neither names nor what a module computes; by name, so that nobody imports torch.distributed.
_WRAPPERS = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"}
# The level between a CLIP text encoder and its parts: there up to transformers 4, gone in 5.
_TEXT_LEVEL = "text_model."


@dataclass(frozen=True)
class Site:
    """One tensor in a network.

    Attributes:
        module: Dotted name of the module; "" is the network itself.
        at: "output" is the first tensor that leaves the module, "output[1]" the second element of a tuple,
            "output[1][0]" the first of that, "input" the first tensor among positional, then keyword arguments.
        name: Name of the results; by default that of the module.
    """

    module: str
    at: str = "output"
    name: str | None = None

    def __post_init__(self) -> None:
        if not _AT.fullmatch(self.at):
            raise ValueError(f"`at` is {self.at!r} for {self.module!r}; it may be 'input', 'output' or 'output[1]'")

    @property
    def key(self) -> str:
        """Name of the results at this site."""
        return self.module if self.name is None else self.name

    @property
    def path(self) -> tuple[int, ...]:
        """The indices of `at`: (1, 0) for "output[1][0]"."""
        return tuple(int(index) for index in re.findall(r"\d+", self.at))


def match(model: nn.Module, patterns: str | Sequence[str], *, kind: type[nn.Module] | None = None) -> list[Site]:
    """Finds the modules whose names match any of the patterns; each is a site at its output.

    Args:
        model: The network; wrappers for several devices are removed from names.
        patterns: Shell patterns on dotted names, in which `*` crosses dots. On CLIP text encoders the level
            `text_model.` is optional. Each pattern has to match something.
        kind: Class of the modules; others are left out.

    Returns:
        Each site once, in the order in which a U-Net runs them: down, mid, up.

    Raises:
        NoMatchError: A pattern matches nothing, or only containers, which are never called; it names the nearest.
    """
    noun = "module" if kind is None else kind.__name__
    return [Site(name) for name in find(model, patterns, lambda m: kind is None or isinstance(m, kind), noun)]


def find(
    model: nn.Module, patterns: str | Sequence[str], accept: Callable[[nn.Module], bool], noun: str
) -> dict[str, nn.Module]:
    """Returns name and module of the accepted modules that match a pattern; `noun` names their kind in messages."""
    modules = modules_of(model)
    usable = {name for name, module in modules.items() if accept(module) and not _is_container(module)}
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = _hits(modules, pattern)
        if usable.isdisjoint(hits):
            raise NoMatchError(_explain(type(model).__name__, modules, usable, pattern, hits, noun))
        found |= usable.intersection(hits)
    return {name: module for name, module in modules.items() if name in found}


def resolve(model: nn.Module, wanted: str | Site | Iterable[str | Site]) -> list[tuple[Site, nn.Module]]:
    """Returns the sites that patterns and sites stand for, each with its module.

    Raises:
        NoMatchError: A pattern or site is not in the network.
        ValueError: Nothing is wanted, or two sites have one name.
    """
    found: dict[str, tuple[Site, nn.Module]] = {}
    for item in [wanted] if isinstance(wanted, str | Site) else wanted:
        exact = isinstance(item, Site)
        name = item.module if exact else item
        modules = _named(model, name) or find(model, glob.escape(name) if exact else name, lambda _: True, "module")
        for name, module in modules.items():
            site = item if exact else Site(name)
            # Overlapping patterns find a module twice; two different sites must not share a name.
            if found.setdefault(site.key, (site, module))[0] != site:
                raise ValueError(f"two sites are called {site.key!r}; give one of them another name")
    if not found:
        raise ValueError("no pattern and no site was given")
    return list(found.values())


def _named(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """Returns the module of exactly this name; searching for each of many takes longer than a forward pass."""
    try:
        module = model.get_submodule(name) if name else None
    except AttributeError:  # a pattern, or a name inside a wrapper
        return {}
    return {} if module is None or _is_container(module) or type(module).__name__ in _WRAPPERS else {name: module}


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Returns every module once by its dotted name, wrappers left out, mid block before up blocks."""
    return dict(_walk(model, "", set()))


def _walk(module: nn.Module, prefix: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    while type(module).__name__ in _WRAPPERS and isinstance(inner := module.module, nn.Module):
        module = inner
    if module in seen:
        return
    seen.add(module)
    yield prefix, module
    children = dict(module.named_children())
    names = list(children)
    if {"mid_block", "up_blocks"} <= children.keys():  # U-Nets register them the other way round
        names.remove("mid_block")
        names.insert(names.index("up_blocks"), "mid_block")
    for name in names:
        yield from _walk(children[name], f"{prefix}.{name}" if prefix else name, seen)


def _hits(names: Iterable[str], pattern: str) -> list[str]:
    if pattern == "":
        return [""]
    names = [name for name in names if name]
    if hits := [name for name in names if fnmatchcase(name, pattern)]:
        return hits
    if any(name.startswith(_TEXT_LEVEL) or f".{_TEXT_LEVEL}" in name for name in names):
        return [name for name in names if fnmatchcase(name.replace(_TEXT_LEVEL, "", 1), pattern)]
    if any(name.endswith("token_embedding") for name in names):  # a text encoder, whose level is gone
        return [name for name in names if fnmatchcase(name, pattern.replace(_TEXT_LEVEL, "", 1))]
    return []


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.ModuleDict)


def _explain(
    network: str, modules: dict[str, nn.Module], usable: set[str], pattern: str, hits: list[str], noun: str
) -> str:
    shown = f"'{printable(pattern, 200)}'"
    containers = [name for name in hits if _is_container(modules[name])]
    children = [name for name in modules if name in usable and name.rpartition(".")[0] in containers]
    if children and len(containers) == len(hits):
        return f"{shown} matches only containers of {network}, which are never called; use {_listed(children)}"
    candidates = [name for name in modules if name in usable]
    last = pattern.rpartition(".")[2]
    # A pattern that ends in a real name most likely errs further left.
    candidates = [name for name in candidates if name.rpartition(".")[2] == last] or candidates
    nearest = heapq.nlargest(3, candidates, key=lambda name: _likeness(pattern, name))
    hint = f"nearest: {_listed(nearest)}; " if nearest else ""
    return f"no {noun} of {network} matches {shown}; {hint}list all with: diffcore hooks MODEL '*'"


def _likeness(pattern: str, name: str) -> float:
    """Returns the similarity, from 0 to 1, of a name or its end to the letters of a pattern."""
    letters = pattern.replace("*", "")[:200]
    return max(difflib.SequenceMatcher(None, letters, end).ratio() for end in (name, name[-len(letters) :]))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{printable(name, 200)}'" for name in names[:4]) + (", …" if len(names) > 4 else "")
