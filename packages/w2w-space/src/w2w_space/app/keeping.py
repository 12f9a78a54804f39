"""A map over subjects that finds each finished one again, whatever group it was computed in.

`RunMap` keeps groups: with another size of the groups none of them is found. Here the parts of a run are

    plan-NAME-0, plan-NAME-1, ...    which items each group of one start of the command holds
    NAME-DIGEST                      the results of one group, a tensor for each item
    note-...                         notes of `RunMap` that processes have met, and that a group is done

so that a later start leaves out what is finished, and shares the rest out in groups of its own size. Groups end as a
whole, so that a start with groups of the same size has the same groups again, and the same last bits.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffcore.digests import digest_of
from diffcore.run import RunMap
from diffcore.units import R, T, units_of


class ItemMap:
    """Goes through items as `RunMap` does, and computes none twice that is finished in a group of any size.

    Args:
        map: Map of the run, which shares groups among processes.
    """

    def __init__(self, map: RunMap) -> None:
        self._map, self._run = map, map.run

    def __call__(
        self, work: Callable[[list[T]], list[R]], items: Sequence[T], *, name: str, kind: type[R], unit_size: int = 1
    ) -> list[R]:
        """Returns one tensor per item, in order; see `diffcore.units.Map`.

        Args:
            work: Computes the results of a group, one for each of its items.
            items: Items that can be hashed; those given twice are computed once.
            name: Word for this kind of work and for all settings that its results depend on besides the items.
            kind: Class of the results, which are tensors.
            unit_size: Number of items that are computed together.
        """
        if not issubclass(kind, Tensor):
            raise TypeError(f"the results are {kind.__name__}; this map keeps tensors alone")
        self._map(lambda unit: [torch.zeros(1)], [0], name=f"note-{name}", kind=Tensor)
        # All processes have met, and none writes before they meet again: all find the same.
        done, start = self._done(name)
        left = [item for item in dict.fromkeys(items) if digest_of(item) not in done]
        groups = [tuple(group) for group in units_of(left, unit_size)]

        def plan(unit: list[int]) -> list[Tensor]:
            words = [[digest_of(item) for item in group] for group in groups]
            self._run.save(f"plan-{name}-{start}", {}, groups=words)
            return [torch.zeros(1)]

        def keep(unit: list[tuple[T, ...]]) -> list[Tensor]:
            for group in unit:
                words = [digest_of(item) for item in group]
                results: Any = work(list(group))
                tensors = {word: result.contiguous() for word, result in zip(words, results, strict=True)}
                self._run.save(_key(name, words), tensors)
            return [torch.zeros(1)] * len(unit)

        if groups:
            self._map(plan, [0], name=f"note-{name}-plan-{start}", kind=Tensor)
            self._map(keep, groups, name=f"note-{name}-{start}", kind=Tensor)
        parts = {key: self._run.load(key).tensors for key in set(self._done(name)[0].values())}
        found: Any = {word: tensors[word] for tensors in parts.values() for word in tensors}
        return [found[digest_of(item)] for item in items]

    def _done(self, name: str) -> tuple[dict[str, str], int]:
        """Returns the key of the part that holds each finished item, and the number of starts before."""
        found, start = dict[str, str](), 0
        while self._run.has(f"plan-{name}-{start}"):
            groups: list[list[str]] = self._run.load(f"plan-{name}-{start}").fields["groups"]
            keys = {_key(name, words): words for words in groups}
            for key in keys.keys() - set(self._run.missing(keys)):
                found |= dict.fromkeys(keys[key], key)
            start += 1
        return found, start


def _key(name: str, words: Sequence[str]) -> str:
    return f"{name}-{digest_of(' '.join(words))}"
