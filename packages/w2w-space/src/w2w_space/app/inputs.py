"""What commands take: adapters in files and folders, their base model, and the subject that a word stands for."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from diffcore.adapters import Adapter, Base, read_adapter, scan_adapter
from diffcore.cli import track
from diffcore.digests import digest_of_values
from diffcore.errors import UserError, printable
from diffcore.io import files
from diffcore.models import resolve
from diffcore.models.bases import base_on_disk, families_of
from w2w_space.app.options import Reading
from w2w_space.coordinates import Point, Space
from w2w_space.files.base import base_of_layout
from w2w_space.files.export import largest_error
from w2w_space.files.importing import Plan, adapter_paths, import_adapters, plan_import
from w2w_space.files.points import is_point, load_point
from w2w_space.files.population import FILE, PopulationFolder
from w2w_space.files.space import base_of_space
from w2w_space.ranks import RankLoss


def adapters_at(sources: Sequence[Path]) -> list[Path]:
    """Returns the adapters that words of a command line name: files, PEFT folders, or folders that hold such.

    Args:
        sources: Files and folders of the command line.
    """
    found: list[Path] = []
    for source in sources:
        below = adapter_paths(source) if source.is_dir() else [source]
        if not below:
            raise UserError(f"{printable(source, 300)} holds no adapter; give files that end in .safetensors")
        found += below
    return list(dict.fromkeys(found))


def base_for(paths: Sequence[Path], model: str | None) -> Base:
    """Returns the base model that a command names, or the family that the first readable adapter fits.

    Args:
        paths: Adapters, at least one.
        model: Name on the command line.
    """
    if model is not None:
        return base_on_disk(resolve(model))
    for path in paths:
        try:
            if fitting := families_of(scan_adapter(path)):
                return fitting[0]
        except UserError:
            continue
    raise UserError(
        f"{printable(paths[0], 300)} fits none of the families sd15, sd21 and sdxl; name its base model with `model`"
    )


def planned(paths: Sequence[Path], reading: Reading) -> tuple[Base, Plan]:
    """Returns base model and layout of adapters, from their headers.

    Args:
        paths: Adapters, at least one.
        reading: Options that say how they are brought to one layout.
    """
    base = base_for(paths, reading.model)
    told = {k: v for k, v in asdict(reading).items() if k not in ("model", "largest_loss")}
    return base, plan_import(paths, base, **told)


def imported(folder: Path, paths: Sequence[Path], base: Base, reading: Reading, **more: Any) -> PopulationFolder:
    """Returns the population of adapters, once it is on disk; goes on where it stopped.

    Args:
        folder: Place of the population.
        paths: Adapters, at least one.
        base: Model that they are adapters of.
        reading: Options that say how they are brought to one layout.
        **more: More arguments of `import_adapters`.
    """
    told = {k: v for k, v in asdict(reading).items() if k != "model"}
    return import_adapters(folder, paths, base, track=lambda p: track(p, "reading adapters"), **told, **more)


def about_plan(paths: Sequence[Path], base: Base, plan: Plan) -> dict[str, Any]:
    """Returns the facts of a layout for people.

    Args:
        paths: Adapters that were looked at.
        base: Model that they are adapters of.
        plan: Layout that suits them.
    """
    return {
        "adapters": len(paths),
        "fitting": len(plan.fitting),
        "left_out": len(plan.skipped),
        "base": base.name,
        "rank": plan.layout.rank,
        "ranks": {str(rank): count for rank, count in plan.ranks.items()},
        "modules": len(plan.layout.modules),
        "convolutions_left_out": plan.convolutions,
        "numbers": plan.layout.size,
        "megabytes": round(len(plan.fitting) * plan.layout.size * 4 / 1e6, 1),
    }


def is_population(path: Path) -> bool:
    """Returns whether a folder holds a population.

    Args:
        path: File or folder of any kind.
    """
    return (path / FILE).is_file()


def digest_of_files(paths: Sequence[Path]) -> str:
    """Returns one digest of the bytes of files and of the files in folders.

    Args:
        paths: Files and folders; what is missing counts as such.
    """
    told = {}
    for path in paths:
        members = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
        told |= {member.as_posix(): files.sha256(member) if member.is_file() else None for member in members}
    return digest_of_values(told)


def adapter_of(path: Path, space: Space, place: Path, model: str | None) -> Adapter:
    """Returns an adapter that is read for the model of a space.

    Args:
        path: File, or folder in PEFT's layout.
        space: Space that it shall be projected to.
        place: File or folder of the space.
        model: Base model, where the command names one; else that which the space was built for.
    """
    if model is not None:
        return read_adapter(path, base_on_disk(resolve(model)))
    base = base_of_space(place)
    alone = base_of_layout(space.layout).shapes == base.shapes
    # A space that knows its own modules alone would refuse adapters that change more.
    return read_adapter(path, (families_of(scan_adapter(path)) or [base])[0] if alone else base)


def subject(word: str, space: Space, place: Path, *, model: str | None = None, unshrink: bool = False) -> Point:
    """Returns the point that a word of a command line stands for.

    Args:
        word: "mean", a member's name, a point file, or an adapter, which is projected.
        space: Space that the point belongs to.
        place: File or folder of the space.
        model: Base model for reading an adapter; by default that of the space.
        unshrink: Whether a projection is lengthened, as coordinates of adapters that were not in the fit are too short.

    Raises:
        UserError: The word stands for nothing.
    """
    if word in space.names:
        return space.member(word)
    if word == "mean":
        return space.point()
    path = Path(word)
    if is_point(path):
        return load_point(path, space)
    if path.exists():
        return space.project(adapter_of(path, space, place, model), unshrink=unshrink)
    members = f"the {len(space.names)} members" if space.names else "members, which the space was written without"
    near = get_close_matches(word, space.names, n=1)
    hint = f"; nearest: {printable(near[0])!r}" if near else "; give a file, a member, or 'mean'"
    raise UserError(f"{printable(word)} is neither a file nor one of {members}{hint}")


def strengths_of(words: Sequence[str]) -> dict[str, float]:
    """Returns what words such as age=+1.5 say.

    Args:
        words: Words of the command line.

    Raises:
        UserError: A word is not of this form, or an attribute is given twice.
    """
    found: dict[str, float] = {}
    for word in words:
        name, sign, value = word.rpartition("=")
        try:
            strength = float(value)
        except ValueError:
            sign = ""
            strength = 0.0
        if not sign or not name or not abs(strength) < float("inf"):
            raise UserError(f"{printable(word)!r} is no attribute with a strength; write age=+1.5")
        if name in found:
            raise UserError(f"{printable(name)!r} is given twice; give one strength for each attribute")
        found[name] = strength
    return found


def ranked(percentile: float) -> str:
    """Returns what is said of a percentile behind a place: nothing where there is nobody to compare with.

    Args:
        percentile: Share of the members in percent; NaN where they are not known.

    Example:
        >>> ranked(93.2), ranked(float("nan"))
        (', percentile 93', '')
    """
    return "" if math.isnan(percentile) else f", percentile {percentile:.0f}"


def about_losses(losses: Mapping[str, RankLoss], *, each: bool = False) -> dict[str, Any]:
    """Returns what a smaller rank lost, for people: of the whole, of the worst module, and perhaps of each.

    Args:
        losses: Loss by the name of the module; empty where nothing was cut.
        each: Whether to tell the loss of each module.
    """
    if not losses:
        return {}
    total = sum(loss.total for loss in losses.values())
    worst = max(losses, key=lambda name: losses[name].relative)
    told: dict[str, Any] = {"loss": (sum(x.lost for x in losses.values()) / total) ** 0.5 if total else 0.0}
    told |= {"worst_loss": losses[worst].relative, "worst_module": worst}
    return told | ({"losses": {name: loss.relative for name, loss in losses.items()}} if each else {})


def read_back(adapter: Adapter, written: Path, base: Base) -> float:
    """Returns the largest relative error of a module's change in a file that was just written.

    Args:
        adapter: Adapter that was written.
        written: Its file or folder.
        base: Model that it is read for.
    """
    return largest_error(adapter, read_adapter(written, base))
