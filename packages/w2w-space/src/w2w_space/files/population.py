"""A population on disk: vectors in shards that are read piece by piece, and a line for each member.

    population.json               layout of the vectors, base model, type of the numbers
    members.jsonl                 a line for each member, and for each file that was left out, with the reason
    shards/00000.safetensors      up to 512 vectors, with a sidecar that holds their sum
    labels.csv                    labels of the members, where somebody made them

Shards are never altered. More vectors go into a new shard, which takes in the last one where that is not full; then
`members.jsonl` is replaced, which is the commit mark; then shards that no line names are deleted. Whatever is killed in
between leaves the old population or the new one.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock, Timeout
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from diffcore.adapters import Base
from diffcore.errors import CorruptArtifactError, UserError, printable
from diffcore.io import artifact, files
from diffcore.io.jsonfile import corrupt, json_line, read_trusted, write_json, write_text
from diffcore.io.strictjson import StrictError, parse
from w2w_space.files.base import base_from_json, base_to_json
from w2w_space.layout import Layout
from w2w_space.population import Population

FILE, MEMBERS, SHARDS, LABELS = "population.json", "members.jsonl", "shards", "labels.csv"
LOCK = "population.lock"
SCHEMA, SHARD_SCHEMA = "w2w-space/population@1", "w2w-space/shard@1"
SHARD_ROWS = 512
"""Largest number of vectors in one shard."""
Precision = Literal["float32", "float16"]


@dataclass(frozen=True)
class Member:
    """One adapter of a population.

    Attributes:
        name: Name within the population.
        source: Path that it was read from; empty for adapters that were trained here.
        rank: Largest rank that its changes had.
        loss: Frobenius norm of what was lost by bringing it to the population's rank, divided by that of its changes.
        dropped: Share of its squared norm in modules that the population leaves out.
        sha256: Digest of its file.
        sketch: Numbers that tell whether its changes may be those of another member, whatever the gauge.
        trained_on: Base model that the file itself names, such as "sd_v1"; empty where it names none.
        notes: Remarks of the reader, such as that no alpha was stated.
        shard: Number of the shard that holds the vector.
        row: Row of the vector in the shard.
    """

    name: str
    source: str = ""
    rank: int = 0
    loss: float = 0.0
    dropped: float = 0.0
    sha256: str = ""
    sketch: tuple[float, ...] = ()
    trained_on: str = ""
    notes: tuple[str, ...] = ()
    shard: int = -1
    row: int = -1


@dataclass(frozen=True)
class Skipped:
    """A file that is no member, and why.

    Attributes:
        source: Path of the file.
        reason: Sentence that says what is wrong with it.
    """

    source: str
    reason: str


class PopulationFolder:
    """A population on disk, as it was when it was opened; its methods that write give the new one.

    It is the matrix of its own vectors: `len`, `columns` and `rows` read what they need from the shards.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], lines: Sequence[Member | Skipped]) -> None:
        self.folder = folder
        self.facts = dict(facts)
        self.members = tuple(line for line in lines if isinstance(line, Member))
        self.skipped = tuple(line for line in lines if isinstance(line, Skipped))

    @classmethod
    def create(
        cls, folder: Path | str, layout: Layout, base: Base, *, dtype: Precision = "float32", **facts: Any
    ) -> "PopulationFolder":
        """Returns an empty population in a new folder.

        Args:
            folder: Place of the population; it holds none yet.
            layout: Table of the vectors.
            base: Model whose adapters the members are.
            dtype: Type of the stored numbers.
            **facts: Plain values about how the population is made.

        Raises:
            UserError: The folder holds a population already, or cannot be written.

        Example:
            >>> layout = Layout.of({"to_q": (4, 3)}, rank=1)
            >>> from w2w_space.files.base import base_of_layout
            >>> folder = PopulationFolder.create("pop", layout, base_of_layout(layout))
            >>> folder = folder.append(torch.randn(2, 7), [Member("alice"), Member("bob")])
            >>> len(folder), PopulationFolder.open("pop").population().names
            (2, ('alice', 'bob'))
        """
        folder = Path(folder)
        if (folder / FILE).exists():
            raise UserError(f"{printable(folder, 300)} holds a population already; add to it, or give another `folder`")
        told = {"schema": SCHEMA, "produced_by": artifact.produced_by("w2w-space"), "created": artifact.utc_now()}
        told |= {"dtype": dtype, "layout": layout.to_json(), "base": base_to_json(base), **facts}
        write_text(folder / MEMBERS, "")
        write_json(folder / FILE, told)
        return cls(folder, told, [])

    @classmethod
    def open(cls, folder: Path | str) -> "PopulationFolder":
        """Returns the population of a folder, after a check of its shards' sizes.

        Args:
            folder: Folder of the population.

        Raises:
            UserError: The folder holds no population.
            CorruptArtifactError: A file is missing, damaged, or of a newer version.
        """
        folder = Path(folder)
        if not (folder / FILE).is_file():
            raise UserError(
                f"{printable(folder, 300)} holds no population, as {FILE} is missing; import adapters first"
            )
        facts = read_trusted(folder / FILE)
        if facts.get("schema") != SCHEMA:
            raise corrupt(folder / FILE, f"has schema {facts.get('schema')!r} where {SCHEMA!r} is needed")
        found = cls(folder, facts, _read_lines(folder / MEMBERS))
        for shard in found.shards:
            artifact.check(found.shard(shard), verify=False)
        return found

    @cached_property
    def layout(self) -> Layout:
        """Table of the vectors."""
        return Layout.from_json(self.facts["layout"])

    @cached_property
    def base(self) -> Base:
        """Model whose adapters the members are: names and shapes of its weights."""
        return base_from_json(self.facts["base"])

    @property
    def dtype(self) -> torch.dtype:
        """Type of the stored numbers."""
        return {"float32": torch.float32, "float16": torch.float16}[self.facts["dtype"]]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the members in the order of the rows."""
        return tuple(member.name for member in self.members)

    @cached_property
    def shards(self) -> dict[int, tuple[list[int], list[int]]]:
        """For each shard the places of its members, and their rows."""
        found: dict[int, tuple[list[int], list[int]]] = {}
        for place, member in enumerate(self.members):
            places, rows = found.setdefault(member.shard, ([], []))
            places.append(place)
            rows.append(member.row)
        return found

    def shard(self, number: int) -> Path:
        """Returns the file of a shard.

        Args:
            number: Number of the shard.
        """
        return self.folder / SHARDS / f"{number:05}.safetensors"

    def __len__(self) -> int:
        return len(self.members)

    def columns(self, span: slice) -> Float[Tensor, "n numbers"]:
        """Returns some numbers of all members, in float32.

        Args:
            span: Range of places in the vector.
        """
        start, stop, _ = span.indices(self.layout.size)
        found = torch.empty(len(self), stop - start)
        for number, (places, rows) in self.shards.items():
            with safe_open(self.shard(number), framework="pt") as file:
                # A slice is a view of the file's map; the assignment copies it.
                found[places] = file.get_slice("vectors")[:, start:stop][rows].float()
        return found

    def rows(self, members: Sequence[int]) -> Float[Tensor, "b size"]:
        """Returns all numbers of some members, in float32.

        Args:
            members: Places of the members.
        """
        found = torch.empty(len(members), self.layout.size)
        wanted: dict[int, list[int]] = {}
        for place, member in enumerate(members):
            wanted.setdefault(self.members[member].shard, []).append(place)
        for number, places in wanted.items():
            with safe_open(self.shard(number), framework="pt") as file:
                rows = [self.members[members[place]].row for place in places]
                found[places] = file.get_slice("vectors")[:][rows].float()
        return found

    def population(self) -> Population:
        """Returns the population, whose vectors stay on disk."""
        return Population(self.layout, self.names, self)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from writing to the population while the block runs.

        Raises:
            UserError: Another process writes to it.
        """
        lock = FileLock(self.folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"another process writes to {printable(self.folder, 300)}; wait until it has ended"
            ) from None
        except OSError as error:
            raise UserError(f"cannot write to {printable(self.folder, 300)}: {printable(error)}") from error
        try:
            yield
        finally:
            lock.release()

    def append(
        self, vectors: Float[Tensor, "b size"], members: Sequence[Member], skipped: Sequence[Skipped] = ()
    ) -> "PopulationFolder":
        """Returns the population with more members, once they are on disk.

        Args:
            vectors: Vectors of the new members.
            members: The new members, a row each; where they are stored is filled in.
            skipped: Files that are recorded as left out.

        Raises:
            UserError: A name is taken.
            MachineError: The disk is full; the population is as it was.
        """
        if taken := sorted({m.name for m in members} & set(self.names)):
            raise UserError(f"the population has a member {taken[0]!r} already; give another name")
        again = {line.source for line in skipped} | {member.source for member in members}
        told = [*(line for line in self.skipped if line.source not in again), *skipped]
        if not members:
            return self._commit(self.members, told)
        last, block, written = self._next() - 1, vectors.to(self.dtype), list(members)
        places = [place for place, member in enumerate(self.members) if member.shard == last]
        if 0 < len(places) < SHARD_ROWS:
            # The last shard is not full: a new one takes its vectors in.
            block = torch.cat([self.rows(places).to(self.dtype), block])
            written = [*(self.members[place] for place in places), *written]
        moved = {member.name: member for member in self._write(block, written)}
        old = [moved.get(member.name, member) for member in self.members]
        return self._commit([*old, *(moved[member.name] for member in members)], told)

    def remove(self, names: Sequence[str]) -> "PopulationFolder":
        """Returns the population without some members, whose vectors are deleted from the disk.

        Args:
            names: Names of the members.

        Raises:
            UserError: There is no such member.
        """
        if unknown := [name for name in names if name not in self.names]:
            some = ", ".join(printable(name) for name in self.names[:3])
            raise UserError(
                f"the population has no member {printable(unknown[0])!r}; its {len(self)} members are {some}"
                + (" and others" if len(self) > 3 else "")
            )
        gone = set(names)
        touched = {member.shard for member in self.members if member.name in gone}
        left = [p for p, m in enumerate(self.members) if m.shard in touched and m.name not in gone]
        moved: dict[str, Member] = {}
        number = self._next()
        for start in range(0, len(left), SHARD_ROWS):
            some = left[start : start + SHARD_ROWS]
            written = self._write(self.rows(some).to(self.dtype), [self.members[place] for place in some], number)
            moved |= {member.name: member for member in written}
            number += 1
        stay = [moved.get(m.name, m) for m in self.members if m.name not in gone]
        return self._commit(stay, self.skipped)

    def verify(self) -> list[str]:
        """Returns what is wrong with the population: nothing for a sound one.

        Checks the sums of all shards, and that all numbers are finite.
        """
        found = []
        for number, (places, rows) in self.shards.items():
            try:
                sidecar = artifact.check(self.shard(number))
            except CorruptArtifactError as error:
                found.append(str(error))
                continue
            count, size = sidecar["tensors"]["vectors"][1]
            if max(rows) >= count or size != self.layout.size:
                found.append(f"shard {number} has {count} x {size} numbers, too few for its members")
                continue
            finite = self.rows(places).isfinite().all(1)
            found += [
                f"{self.names[p]!r} has numbers that are not finite"
                for p, f in zip(places, finite, strict=True)
                if not f
            ]
        return found

    def _next(self) -> int:
        """Returns a number that no shard of a member has."""
        return max((member.shard for member in self.members), default=-1) + 1

    def _write(self, vectors: Tensor, members: Sequence[Member], number: int | None = None) -> list[Member]:
        number, placed = self._next() if number is None else number, []
        for start in range(0, len(members), SHARD_ROWS):
            some = members[start : start + SHARD_ROWS]
            names = [member.name for member in some]
            artifact.save(
                self.shard(number), {"vectors": vectors[start : start + SHARD_ROWS]}, schema=SHARD_SCHEMA, names=names
            )
            placed += [replace(member, shard=number, row=row) for row, member in enumerate(some)]
            number += 1
        return placed

    def _commit(self, members: Sequence[Member], skipped: Sequence[Skipped]) -> "PopulationFolder":
        lines = [{"state": "member", **asdict(m)} for m in members] + [
            {"state": "skipped", **asdict(s)} for s in skipped
        ]
        write_text(self.folder / MEMBERS, "".join(map(json_line, lines)))
        new = PopulationFolder(self.folder, self.facts, [*members, *skipped])
        kept = {new.shard(number) for number in new.shards}
        for path in sorted((self.folder / SHARDS).glob("[0-9]*.safetensors")):
            if path not in kept:
                with files.explained(path):
                    files.remove(path)
                    files.remove(path.with_suffix(".json"))
        return new


def _read_lines(path: Path) -> list[Member | Skipped]:
    if not path.is_file():
        raise corrupt(path, "is missing")
    found: list[Member | Skipped] = []
    with files.explained(path, reading=True):
        text = files.read(path)
    for number, line in enumerate(text.splitlines(), 1):
        try:
            values: Any = parse(line)
            state = values.pop("state")
            if state == "member":
                values |= {"sketch": tuple(values["sketch"]), "notes": tuple(values["notes"])}
            found.append(Member(**values) if state == "member" else Skipped(**values))
        except (StrictError, AttributeError, KeyError, TypeError) as error:
            raise corrupt(path, f"is damaged in line {number}") from error
    return found
