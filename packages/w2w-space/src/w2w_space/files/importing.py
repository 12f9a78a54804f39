"""Adapters of other tools brought into one population: each file is read, or named and left out with the reason.

The members' vectors have one layout. It is fixed when the population is made, from the headers of all files: the
commonest rank, and the modules that all files change, or that any does. A file is left out where it is damaged, is no
LoRA of the base model, changes no module of the layout, loses too much at the layout's rank, or repeats a member.

A file that was changed since it was read takes the place of its old member. Where the new content cannot be a member,
the old one stays.
"""

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from diffcore.adapters import Adapter, AdapterFile, Base, LowRank, scan_adapter
from diffcore.adapters.keys import BACKBONE
from diffcore.adapters.read import place, read_scanned
from diffcore.adapters.scan import DIFFUSERS_WEIGHTS, MARKERS, PEFT_CONFIG, PEFT_WEIGHTS
from diffcore.digests import digest_of_values
from diffcore.errors import IncompatibleModelError, UserError, printable
from diffcore.io import files
from diffcore.io.tensorfile import read_header
from w2w_space.files.base import base_to_json
from w2w_space.files.duplicates import Duplicates
from w2w_space.files.materialise import materialise, modules_of_other
from w2w_space.files.population import FILE as POPULATION
from w2w_space.files.population import SHARD_ROWS, Member, PopulationFolder, Precision, Skipped
from w2w_space.layout import Layout, Shape
from w2w_space.population import vector_of
from w2w_space.ranks import RankLoss

_LOG = logging.getLogger("diffcore.w2w_space")
Modules = Literal["intersection", "union"]
LARGEST_LOSS = 0.5
"""Relative loss by the rank above which a file is left out."""
_TEXT_ALONE = "changes text encoders alone, which are not part of a space"
_SCANS = 1000  # headers that are kept, some 100 KB each
_CLAIMS = ("ss_base_model_version", "ss_sd_model_name")


@dataclass(frozen=True)
class Plan:
    """The layout that suits some files, from their headers alone.

    Attributes:
        layout: Table of the vectors.
        fitting: Files that can be read.
        skipped: Files that cannot, with the reason.
        ranks: Number of modules of each rank.
        convolutions: Number of changed convolutions that are left out.
        scans: Checked headers of the first files that fit, which need not be read again while the files stay as they
            are.
    """

    layout: Layout
    fitting: tuple[Path, ...]
    skipped: tuple[Skipped, ...]
    ranks: dict[int, int]
    convolutions: int
    scans: "Scans" = field(default_factory=lambda: Scans())


class Scans:
    """Checked headers of adapters, for files that have neither another size nor another date since."""

    def __init__(self) -> None:
        self._kept: dict[Path, tuple[list[tuple[int, int]], AdapterFile]] = {}

    def keep(self, found: AdapterFile) -> None:
        """Keeps a header, while there are not too many.

        Args:
            found: Header as `scan_adapter` returns it.
        """
        stamps = _stamps(found.path)
        # Markers are told of when a file is read.
        if stamps and len(self._kept) < _SCANS and not any(name in found.header.tensors for name in MARKERS):
            self._kept[found.path] = (stamps, found)

    def __call__(self, path: Path) -> AdapterFile:
        """Returns the header of an adapter, kept or read.

        Args:
            path: File, or folder in PEFT's layout.
        """
        stamps, found = self._kept.pop(path, (None, None))
        return found if found is not None and stamps is not None and stamps == _stamps(path) else scan_adapter(path)


def _stamps(path: Path) -> list[tuple[int, int]] | None:
    try:
        parts = sorted(path.iterdir()) if path.is_dir() else [path]
        return [(status.st_mtime_ns, status.st_size) for status in (part.stat() for part in parts)]
    except OSError:
        return None


def plan_import(
    paths: Sequence[Path | str],
    base: Base,
    *,
    rank: int | None = None,
    modules: Modules = "intersection",
    convolutions: bool = False,
    materialise: bool = False,
    strict: bool = False,
) -> Plan:
    """Returns the layout of a population of adapter files, after a check of their headers.

    Args:
        paths: Files, or folders in PEFT's layout.
        base: Model that they are adapters of.
        rank: Rank of all; by default the commonest one of their modules, the smaller where two are as common.
        modules: "intersection" takes the modules that all files change, "union" those that any changes.
        convolutions: Whether changes of convolutions are taken too.
        materialise: Whether LoHa, LoKr and whole differences are turned into LoRAs of the rank of all.
        strict: Whether a file that does not fit is an error.

    Raises:
        UserError: No file fits, or, where `strict`, one does not.
        IncompatibleModelError: No module is changed by all files.
    """
    fitting, skipped, changed = list[Path](), list[Skipped](), list[set[str]]()
    ranks, left_out, shapes, scans = Counter[int](), set[str](), dict[str, Shape](), Scans()
    for path in map(Path, paths):
        found = None
        try:
            try:
                found = _quietly(scan_adapter, path)
                names = _modules(found, base)
            except IncompatibleModelError as error:
                if not materialise:
                    raise
                names = _of_other(path, base, error)
        except UserError as error:
            if strict:
                raise
            skipped.append(Skipped(path.as_posix(), str(error)))
            continue
        plain = {name: r for name, r in names.items() if convolutions or len(base.shapes[BACKBONE][name]) == 2}
        left_out |= set(names) - set(plain)
        if not plain:
            reason = f"{printable(path, 300)} changes convolutions alone; pass `convolutions`=True to take them"
            if strict:
                raise UserError(reason)
            skipped.append(Skipped(path.as_posix(), reason))
            continue
        ranks.update(r for r in plain.values() if r)
        fitting.append(path)
        if found is not None:
            scans.keep(found)
        changed.append(set(plain))
        shapes |= {name: base.shapes[BACKBONE][name] for name in plain}
    if not fitting:
        if not skipped:
            raise UserError("there are no files; give some that end in .safetensors")
        count = f"none of {len(paths)} files is an adapter of {printable(base.name)}; the first: "
        raise UserError((count if len(paths) > 1 else "") + skipped[0].reason)
    chosen = set[str]().union(*changed) if modules == "union" else set.intersection(*changed)
    if not chosen:
        raise IncompatibleModelError(
            f"no module is changed by all {len(fitting)} adapters: {printable(_loner(fitting, changed), 300)} has the "
            "fewest in common with the others; leave it out, or pass `modules`='union'"
        )
    if rank is None and not ranks:
        raise UserError("no file says a rank; give the `rank` that LoHa, LoKr and differences are brought to")
    rank = rank or max(sorted(ranks), key=lambda r: ranks[r])
    layout = Layout.of({name: shapes[name] for name in chosen}, rank, base.backbone)
    return Plan(layout, tuple(fitting), tuple(skipped), dict(ranks.most_common()), len(left_out), scans)


def import_adapters(
    folder: Path | str,
    paths: Sequence[Path | str],
    base: Base,
    *,
    rank: int | None = None,
    modules: Modules = "intersection",
    convolutions: bool = False,
    materialise: bool = False,
    strict: bool = False,
    largest_loss: float = LARGEST_LOSS,
    dtype: Precision = "float32",
    track: Callable[[Sequence[Path]], Iterable[Path]] = iter,
) -> PopulationFolder:
    """Returns a population of adapter files, once it is on disk; the same call goes on where it stopped.

    Args:
        folder: Place of the population, a new folder or one that the same call began.
        paths: Files, or folders in PEFT's layout.
        base: Model that they are adapters of.
        rank: Rank of all; by default the commonest one of their modules.
        modules: "intersection" takes the modules that all files change, "union" those that any changes, where a file
            that does not change one has zeros.
        convolutions: Whether changes of convolutions are taken too.
        materialise: Whether LoHa, LoKr and whole differences are turned into LoRAs of the rank of all.
        strict: Whether a file that is left out is an error.
        largest_loss: Relative loss by the rank, in the Frobenius norm, above which a file is left out.
        dtype: Type of the stored numbers.
        track: Goes through the files, and may show how far they are read.

    Raises:
        UserError: No file fits; where `strict`, one does not; or the folder holds a population with other settings.
    """
    settings = {"rank": rank, "modules": modules, "convolutions": convolutions, "largest_loss": largest_loss}
    settings |= {"materialise": True} if materialise else {}
    if (Path(folder) / POPULATION).exists():
        there = PopulationFolder.open(folder)
        if there.facts.get("settings") != settings or there.facts["dtype"] != dtype:
            raise UserError(
                f"{printable(folder, 300)} holds a population that was made with other settings; give another `folder`"
            )
        if base_to_json(there.base)["shapes"] != base_to_json(base)["shapes"]:
            raise IncompatibleModelError(
                f"{printable(folder, 300)} holds adapters of {printable(there.base.name)}, whose layers are not those "
                f"of {printable(base.name)}; give another `folder`"
            )
        scans = Scans()
    else:
        told = {"modules": modules, "convolutions": convolutions, "materialise": materialise, "strict": strict}
        plan = plan_import(paths, base, rank=rank, **told)
        there = PopulationFolder.create(folder, plan.layout, base, dtype=dtype, settings=settings)
        scans = plan.scans
    return add(there, paths, strict=strict, largest_loss=largest_loss, track=track, scans=scans)


def add(
    population: PopulationFolder,
    paths: Sequence[Path | str],
    *,
    strict: bool = False,
    largest_loss: float = LARGEST_LOSS,
    track: Callable[[Sequence[Path]], Iterable[Path]] = iter,
    scans: Scans | None = None,
) -> PopulationFolder:
    """Returns a population with more files, in the layout that it has; files that are members are passed over.

    A file that was changed since it became a member takes that member's place.

    Args:
        population: Population as it is on disk.
        paths: Files, or folders in PEFT's layout.
        strict: Whether a file that is left out is an error.
        largest_loss: Relative loss by the rank above which a file is left out.
        track: Goes through the files, and may show how far they are read.
        scans: Headers that `plan_import` has checked already.

    Raises:
        UserError: Where `strict`, a file that is left out; or another process adds to the population.
    """
    with population.locked():
        return _Adding(population, scans or Scans(), strict=strict, largest_loss=largest_loss).all(
            [Path(p) for p in paths], track
        )


class _Adding:
    """Adds files to a population: what was read is on disk after every shard, and whatever ends it."""

    def __init__(self, population: PopulationFolder, scans: Scans, *, strict: bool, largest_loss: float) -> None:
        self.scans, self.population, self.strict, self.largest_loss = scans, population, strict, largest_loss
        self.by_source = {member.source: member for member in population.members if member.source}
        self.names, self.duplicates = set(population.names), Duplicates(population)
        self.members, self.skipped, self.replaced = list[Member](), list[Skipped](), list[str]()

    def all(self, paths: Sequence[Path], track: Callable[[Sequence[Path]], Iterable[Path]]) -> PopulationFolder:
        try:
            for path in track(paths):
                try:
                    self.one(path)
                except UserError as error:
                    _tell(path, str(error), self.strict)
                    self.skipped.append(Skipped(path.as_posix(), str(error)))
                if len(self.members) == SHARD_ROWS:
                    self.commit()
        finally:
            self.commit()
        return self.population

    def one(self, path: Path) -> None:
        digest = _digest(path)
        old = self.by_source.get(path.as_posix())
        if old is not None and old.sha256 == digest:
            return
        member, vector = _read(path, self.population, digest, self.largest_loss, self.scans)
        sketch = self.duplicates.sketch(vector)
        twin = self.duplicates.twin(vector, sketch, other_than=None if old is None else old.name)
        if twin is not None:
            raise UserError(f"{printable(path, 300)} is the same adapter as {twin!r}")
        if old is not None:
            if old.name not in self.population.names:  # named twice among the paths, and changed in between
                raise UserError(f"{printable(path, 300)} changed while it was read; run the same command again")
            _LOG.warning("replaced: %s was changed since it became the member %r", printable(path, 300), old.name)
            self.replaced.append(old.name)
            self.duplicates.forget(old.name)
        name = _free_name(path, self.names) if old is None else old.name
        member = replace(member, name=name, sketch=tuple(sketch.tolist()))
        self.names.add(name)
        self.duplicates.add(name, vector, sketch)
        self.members.append(member)
        self.by_source[path.as_posix()] = member

    def commit(self) -> None:
        fresh = list(self.duplicates.fresh.values())
        block = torch.stack(fresh) if fresh else torch.empty(0, self.population.layout.size)
        if self.replaced:
            # Interrupted between the two, the population lacks these members, and the same import reads them again.
            self.population = self.population.remove(self.replaced)
            self.replaced.clear()
        self.population = self.population.append(block, self.members, self.skipped)
        self.duplicates.written(self.population)
        self.members.clear()
        self.skipped.clear()


def adapter_paths(folder: Path | str) -> list[Path]:
    """Returns the adapters below a folder: safetensors files, and folders in PEFT's layout in place of their files.

    Runs, populations, spaces and points of ours that lie among them are passed over, also where the folder is one.

    Args:
        folder: Folder that is searched, with the folders in it.
    """
    folder, found = Path(folder), set[Path]()
    with files.explained(folder, reading=True):
        below = sorted(folder.rglob("*.safetensors"))
        parents = {parent for path in below for parent in path.parents if folder in (parent, *parent.parents)}
        ours = {parent for parent in parents if any((parent / name).is_file() for name in ("run.json", POPULATION))}
    for path in below:
        if not ours.intersection(path.parents) and not _is_ours(path):
            in_folder = path.name == PEFT_WEIGHTS and path.with_name(PEFT_CONFIG).is_file()
            found.add(path.parent if in_folder else path)
    return sorted(found)


def _is_ours(path: Path) -> bool:
    """Returns whether a file is an artefact of ours, which has a sidecar; other tools keep notes in such files too."""
    if not path.with_suffix(".json").is_file():
        return False
    try:
        return read_header(path).metadata.get("schema", "").startswith("w2w-space/")
    except UserError:
        return False


def _read(
    path: Path, population: PopulationFolder, digest: str, largest_loss: float, scans: Scans
) -> tuple[Member, Tensor]:
    """Returns a member without its name, and its vector; raises UserError for a file that is left out."""
    layout, told_on, lost = population.layout, dict[str, str](), None
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            found = scans(path)
            adapter, told_on = read_scanned(found, population.base), found.header.metadata
        except IncompatibleModelError as error:
            if not population.facts.get("settings", {}).get("materialise"):
                raise
            adapter, lost = _other(path, population, error)
    notes = [str(warning.message) for warning in told]
    if lost is not None:
        notes.append("no LoRA: a LoHa, a LoKr or whole differences, brought to the rank of all")
    if not adapter.modules:
        raise UserError(f"{printable(path, 300)} {_TEXT_ALONE}")
    inside = {name: change for name, change in adapter.modules.items() if name in layout.modules}
    if not inside:
        raise UserError(f"{printable(path, 300)} changes none of the {len(layout.modules)} modules of the population")
    if adapter.text_encoders:
        notes.append(f"changes of {', '.join(sorted(adapter.text_encoders))} are left out")
    vector, loss = vector_of(Adapter(inside, backbone=adapter.backbone, name=path.stem), layout)
    if lost is not None:  # the adapter has the population's rank already, and lost what it lost on the way there
        loss = RankLoss(sum(lost[name].lost for name in inside), sum(lost[name].total for name in inside))
    if loss.total == 0:
        raise UserError(f"{printable(path, 300)} changes nothing: all its products are zero")
    if not bool(vector.isfinite().all()):
        raise UserError(f"{printable(path, 300)} has changes that are NaN or infinite once alpha is folded in")
    if loss.relative > largest_loss:
        raise UserError(
            f"{printable(path, 300)} loses {loss.relative:.0%} at rank {layout.rank}; pass a larger `rank`, or a "
            "larger `largest_loss`"
        )
    stored = vector.to(population.dtype).float()
    if not bool(stored.isfinite().all()) or float((stored - vector).norm()) > 0.01 * float(vector.norm()):
        raise UserError(
            f"{printable(path, 300)} has numbers that float16 does not hold; store the population in float32"
        )
    outside = sum(_energy(change) for name, change in adapter.modules.items() if name not in layout.modules)
    member = Member(
        path.stem,
        source=path.as_posix(),
        rank=max(change.rank for change in inside.values()),
        loss=loss.relative,
        dropped=outside / (outside + loss.total),
        sha256=digest,
        trained_on=", ".join(printable(told_on[key]) for key in _CLAIMS if key in told_on),
        notes=tuple(notes),
    )
    return member, vector


def _of_other(path: Path, base: Base, refused: UserError) -> dict[str, int]:
    """Returns the modules that a file of another method changes; where it is none either, the first error counts."""
    try:
        return modules_of_other(path, base)
    except UserError:
        raise refused from None


def _other(path: Path, population: PopulationFolder, refused: UserError) -> tuple[Adapter, dict[str, RankLoss]]:
    _of_other(path, population.base, refused)
    return materialise(path, population.base, population.layout.rank)


def _energy(change: LowRank) -> float:
    """Returns the squared Frobenius norm of a change, without forming it."""
    down, up = change.down.flatten(1).double(), change.up.double()
    return (change.alpha / change.rank) ** 2 * float((down @ down.T * (up.T @ up)).sum())


def _modules(found: AdapterFile, base: Base) -> dict[str, int]:
    """Returns the rank of each module of the backbone that a file changes."""
    places = place(found, base)
    names = {module: pair.rank for pair, (component, module) in places.items() if component == BACKBONE}
    if not names:
        raise UserError(f"{printable(found.path, 300)} {_TEXT_ALONE}")
    return names


def _quietly(scan: Callable[[Path], AdapterFile], path: Path) -> AdapterFile:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # told once, when the file is read
        return scan(path)


def _digest(path: Path) -> str:
    """Returns the digest of a file's bytes; of a folder's, that of weights and configuration."""
    if not path.is_dir():
        return files.sha256(path)
    names = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".json"))
    return digest_of_values([files.sha256(p) for p in names])


def _free_name(path: Path, taken: set[str]) -> str:
    """Returns the stem of a file, or more of its path where the stem is taken or says nothing."""
    name = (
        path.parent.name if path.name in (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS) else path.name.removesuffix(".safetensors")
    )
    if name in taken and not path.is_dir():
        name = f"{path.parent.name}/{name}"
    found, number = name, 2
    while found in taken:
        found, number = f"{name}-{number}", number + 1
    return found


def _loner(paths: Sequence[Path], changed: Sequence[set[str]]) -> Path:
    """Returns the file whose modules the fewest other files change."""
    counts = Counter(name for names in changed for name in names)
    return min(zip(paths, changed, strict=True), key=lambda pair: max(counts[name] for name in pair[1]))[0]


def _tell(path: Path, reason: str, strict: bool) -> None:
    if strict:
        raise UserError(f"{reason} (`strict` allows no file to be left out)")
    _LOG.warning("left out: %s", reason)
