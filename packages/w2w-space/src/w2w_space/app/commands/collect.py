"""The commands on adapters of other tools: import, convert, info."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from diffcore.cli import Flag, emit
from diffcore.errors import UserError, printable
from w2w_space.app.options import BaseModel, FormatName, Overwrite, PrecisionName, Reading, Sources

if TYPE_CHECKING:
    from w2w_space.files.population import PopulationFolder


def import_(
    sources: Sources,
    *,
    out: Path,
    authors: Flag = False,
    allow_pickle: Flag = False,
    num_components: int | None = None,
    precision: Literal["float32", "float16"] = "float32",
    reading: Reading = Reading(),
    dry_run: Flag = False,
    json: Flag = False,
) -> int:
    """Bring LoRA files of any layout into one population, or the authors' published files into a space.

    Shortest form: w2w-space import LORAS --out POPULATION

    The same command again adds what is new, and replaces members whose file was changed. A file that cannot be a member
    is named with the reason, and left out.

    Args:
        out: Folder of the population, new or begun before; with --authors, that of the space.
        authors: Take SOURCES for the folder of the authors' mean.pt, std.pt, V.pt and weight_dimensions.pt.
        allow_pickle: Read pickles, which the authors' files are, as tensors alone.
        num_components: Largest number of components that are read of the authors' files.
        precision: Precision of the stored numbers; with --authors, of the components.
        dry_run: Print what would be done and written, and do nothing.
        json: Print the result as one JSON object.
    """
    if authors:
        return _import_authors(sources, out, allow_pickle, num_components, precision, dry_run, json)
    from w2w_space.app.inputs import about_plan, adapters_at, base_for, imported, planned

    paths = adapters_at(sources)
    if dry_run:
        emit({**about_plan(paths, *planned(paths, reading)), "writes": out}, json)
        return 0
    before = _digests(out)
    found = imported(out, paths, base_for(paths, reading.model), reading, dtype=precision)
    told = about_population(found)
    told["replaced"] = [m.name for m in found.members if before.get(m.source, m.sha256) != m.sha256]
    emit(told if json else {name: value for name, value in told.items() if name != "skipped"}, json)
    return 0


def _digests(folder: Path) -> dict[str, str]:
    """Returns the digest of each member's file as it was read, by the path; of no population none."""
    from w2w_space.app.inputs import is_population
    from w2w_space.files.population import PopulationFolder

    members = PopulationFolder.open(folder).members if is_population(folder) else ()
    return {member.source: member.sha256 for member in members if member.source}


def remove(
    population: Annotated[Path, Parameter(help="Folder of the population.")],
    names: Annotated[tuple[str, ...], Parameter(negative="", help="Names of the members to take out.")],
    *,
    json: Flag = False,
) -> int:
    """Take members out of a population, and delete their numbers from the disk.

    Shortest form: w2w-space remove POPULATION NAME

    Spaces that were built with them stay as they are: build them again. The same import would add the files again.

    Args:
        json: Print the result as one JSON object.
    """
    from w2w_space.files.population import PopulationFolder

    found = PopulationFolder.open(population)
    with found.locked():
        left = found.remove(names)
    emit({"removed": list(dict.fromkeys(names)), "members": len(left), "folder": population}, json)
    return 0


def _import_authors(
    sources: tuple[Path, ...],
    out: Path,
    allow_pickle: bool,
    num_components: int | None,
    precision: Literal["float32", "float16"],
    dry_run: bool,
    json: bool,
) -> int:
    from w2w_space.files.authors import import_authors
    from w2w_space.files.space import FILE, save_space
    from w2w_space.space import about

    if len(sources) != 1:
        raise UserError(f"there are {len(sources)} `sources`; with --authors, give the one folder of their files")
    if dry_run:
        emit({"reads": sources[0], "writes": out / FILE}, json)
        return 0
    space = import_authors(sources[0], allow_pickle=allow_pickle, num_components=num_components)
    path = out if out.suffix == ".safetensors" else out / FILE
    emit({"space": save_space(space, path, dtype=precision), **about(space)}, json)
    return 0


def convert(
    file: Path,
    out: Path,
    *,
    format: FormatName = "diffusers",
    rank: int | None = None,
    materialise: Flag = False,
    dtype: PrecisionName | None = None,
    model: BaseModel = None,
    overwrite: Overwrite = False,
    json: Flag = False,
) -> int:
    """Write a LoRA in another layout or at another rank, so that every tool applies it at its strength.

    Shortest form: w2w-space convert FILE OUT.safetensors --rank 8

    Alpha is folded into the factors. With a rank, the nearest change of that rank is written, and what is lost is told.

    Args:
        file: Safetensors file, or folder in PEFT's layout.
        out: File to write, ending in .safetensors; for peft a folder.
        format: Use diffusers for load_lora_weights, kohya for web UIs, peft for PeftModel.from_pretrained.
        rank: Rank of every module; by default the largest that the file has.
        materialise: Turn a LoHa, a LoKr or whole differences into a LoRA of this rank.
        dtype: Precision to write; by default the source's where it is exact, else float32.
        json: Print the result as one JSON object, with the loss of every module.
    """
    import torch

    from diffcore.adapters import read_adapter, write_adapter
    from w2w_space.app.inputs import about_losses, base_for, read_back
    from w2w_space.files.materialise import materialise as as_lora
    from w2w_space.ranks import adapter_at_rank

    if rank is not None and rank < 1:
        raise UserError(f"`rank` is {rank}; give at least 1")
    if materialise and rank is None:
        raise UserError("`materialise` needs the `rank` of the LoRA, such as 8; what is lost is told")
    if materialise and model is None:
        raise UserError("`materialise` needs the base `model`: a pipeline folder, safetensors file, or zoo:NAME")
    base = base_for([file], model)
    losses = {}
    if materialise and rank is not None:
        adapter, losses = as_lora(file, base, rank)
    else:
        adapter = read_adapter(file, base)
    if rank is not None and not materialise:
        adapter, losses = adapter_at_rank(adapter, rank)
    chosen = None if dtype is None else getattr(torch, dtype)
    written = write_adapter(adapter, out, format=format, dtype=chosen, base=base, overwrite=overwrite)
    told: dict[str, Any] = {"written": written, "format": format, "base": base.name, "modules": len(list(adapter))}
    told |= {"largest_rounding_error": read_back(adapter, written, base)}
    if losses:
        told |= {"rank": rank, **about_losses(losses, each=json)}
    emit(told, json)
    return 0


def info(thing: Path, *, model: BaseModel = None, json: Flag = False) -> int:
    """Describe a space, a population, a point, or a LoRA file: layout, rank, alpha, modules, and what it was made for.

    Shortest form: w2w-space info FILE

    Args:
        thing: Space file or folder, folder of a population, point, or adapter.
        json: Print one JSON object, with all that is known.
    """
    from w2w_space.app.inputs import is_population
    from w2w_space.files.points import is_point
    from w2w_space.files.space import details_of_space, is_space, load_any_space

    if is_space(thing):
        from w2w_space.space import about

        told = details_of_space(thing)
        more = {"made_by": told["produced_by"], "base": told["base"]["name"], "fingerprint": told["fingerprint"][:16]}
        emit({"kind": "space", **about(load_any_space(thing)), **more}, json)
    elif is_population(thing):
        from w2w_space.files.population import PopulationFolder

        found = PopulationFolder.open(thing)
        told = about_population(found) | {"problems": found.verify()}
        emit(told if json else {name: value for name, value in told.items() if name != "skipped"}, json)
        return 1 if told["problems"] else 0
    elif is_point(thing):
        from diffcore.io import artifact

        fields = artifact.check(thing)
        emit({"kind": "point"} | {name: fields[name] for name in ("name", "space", "residual", "created")}, json)
    else:
        _emit_adapter(thing, model, json)
    return 0


def about_population(found: "PopulationFolder") -> dict[str, Any]:
    """Returns the facts of a population for people.

    Args:
        found: Population as it is on disk.
    """
    losses = sorted((member.loss, member.name) for member in found.members)
    trained_on = Counter(member.trained_on for member in found.members)
    silent = [member.name for member in found.members if any("alpha" in note for note in member.notes)]
    return {
        "kind": "population",
        "folder": found.folder,
        "members": len(found),
        "left_out": len(found.skipped),
        "base": found.base.name,
        "rank": found.layout.rank,
        "modules": len(found.layout.modules),
        "numbers": found.layout.size,
        "median_loss_by_rank": losses[len(losses) // 2][0] if losses else None,
        "worst_loss_by_rank": losses[-1][0] if losses else None,
        "worst_member": losses[-1][1] if losses and losses[-1][0] > 0 else None,
        "largest_share_in_other_modules": max((member.dropped for member in found.members), default=None),
        "without_stated_alpha": len(silent),
        "trained_on": {name or "not stated": count for name, count in trained_on.most_common()},
        "skipped": [{"file": line.source, "reason": line.reason} for line in found.skipped],
    }


def _emit_adapter(path: Path, model: str | None, json: bool) -> None:
    from diffcore.models import resolve
    from diffcore.models.describe_adapter import describe_adapter
    from w2w_space.files.sliders import slider_of
    from w2w_space.files.trigger_words import trigger_words

    if not path.exists():
        raise UserError(f"{printable(path, 300)} does not exist; give a space, a population, a point, or an adapter")
    told = {"kind": "adapter", **describe_adapter(path, None if model is None else resolve(model))}
    told["trigger_words"] = trigger_words(path)
    if slider := slider_of(path):
        told["slider"] = slider
    if not json:
        told = {name: value for name, value in told.items() if name not in ("changes", "misfit")}
        for name in ("ranks", "alphas"):
            told[name] = ", ".join(f"{value} ({count} modules)" for value, count in told[name].items())
        told["fits"] = ", ".join(told["fits"]) or "none of sd15, sd21, sdxl; name a base with --model"
    emit(told, json)
