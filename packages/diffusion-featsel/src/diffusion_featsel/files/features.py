"""Features on disk: shards of tensors, an index of images, and a description; written to resume and read in slices.

    features.json               what was extracted, from which model, by which protocol
    projections.safetensors     basis and mean of each activation, where features are projected
    features/000123.safetensors one tensor (n, c, h, w) for each activation
    features/000123.json        the rows of this shard; written last, so that a shard without it does not count
    index.jsonl                 one line per image file, in the order of names; written when all shards are there

Shards are cut from the list of distinct images alone. So any number of processes may share them, and an extraction that
was interrupted ends with the same bytes as one that was not.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from diffcore.digests import digest_of_values
from diffcore.errors import CorruptArtifactError, RunMismatchError, UserError, printable
from diffcore.io import files
from diffcore.io.artifact import installed_version
from diffcore.io.jsonfile import json_line, read_json, read_trusted, write_json, write_text
from diffusion_featsel.extract import Batch, Extracted, Storage, extract, fit_projections
from diffusion_featsel.extractor import FeatureExtractor
from diffusion_featsel.files.images import ImageList, ListedImage, prompts_of
from diffusion_featsel.files.latents import LatentFolder
from diffusion_featsel.prepare import placed
from diffusion_featsel.project import Projection
from diffusion_featsel.protocol import multiple_of

SCHEMA = "diffusion-featsel/features@1"
_HEADER = 4096  # bytes for names and shapes
MAX_SHARD = 512 * 2**20
"""Largest number of bytes of one shard."""


@dataclass(frozen=True)
class Plan:
    """An extraction that is cut into shards and not yet computed.

    Attributes:
        extractor: Extractor of the wanted activations, with projections in place.
        images: All images that are extracted.
        description: Content of `features.json`, without the fingerprint.
        shards: The distinct images of each shard, all of one prepared size.
        batch_size: Number of images that are computed together.
        storage: Precision of the features.
        prompts: Prompt by file name; None takes the extractor's for all.
    """

    extractor: FeatureExtractor
    images: ImageList
    description: Mapping[str, Any]
    shards: tuple[tuple[ListedImage, ...], ...]
    batch_size: int
    storage: Storage
    prompts: Mapping[str, str] | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Digest of everything that the bytes of the shards depend on."""
        shown = [[(image.name, image.sha256) for image in shard] for shard in self.shards]
        return digest_of_values([dict(self.description), shown])


def plan_features(
    extractor: FeatureExtractor,
    images: ImageList,
    *,
    prompts: Mapping[str, str] | None = None,
    project: str | None = None,
    storage: Storage = "auto",
    batch_size: int = 8,
    shard_bytes: int = MAX_SHARD,
) -> Plan:
    """Cuts an extraction into shards; principal components are found here, on the first 64 images.

    Args:
        extractor: Extractor of the wanted activations. They are stored as they are: readers normalise them.
        images: The images; those that show the same are computed once.
        prompts: Prompt by file name; by default the extractor's prompt for all.
        project: "pca:D" or "random:D" stores D channels of each activation.
        storage: Precision of the features.
        batch_size: Number of images that are computed together.
        shard_bytes: Largest number of bytes of one shard.

    Raises:
        UserError: An image has no prompt, settings do not fit, or one image takes more than a shard.
    """
    if batch_size < 1:
        raise UserError(f"`batch_size` is {batch_size}; give at least 1")
    if extractor.normalise != "none":
        raise UserError(f"`normalise` is {extractor.normalise!r}, but features are stored raw; set it to 'none'")
    distinct = _distinct(images, prompts)
    groups: dict[tuple[int, int], list[ListedImage]] = {}
    for image in distinct:
        groups.setdefault(_prepared_size(extractor, image), []).append(image)
    if project is not None:
        first = next(iter(groups.values()))[:64]
        cut = (first[start : start + batch_size] for start in range(0, len(first), batch_size))
        found = fit_projections(extractor, (_batch(images, part, extractor, prompts) for part in cut), project)
        extractor = extractor.only(extractor.selection.names)
        extractor.projections = found
    bytes_each = 4 if storage == "float32" else 2
    shards: list[tuple[ListedImage, ...]] = []
    for size, members in groups.items():
        rows = {row.name: row for row in extractor.activations(size)}
        places = {name: row.grid[0] * row.grid[1] if row.grid else 0 for name, row in rows.items()}
        one = sum(extractor.channels(name) * places[name.partition("@")[0]] for name in extractor.names) * bytes_each
        room = shard_bytes - _HEADER
        if one > room:
            raise UserError(
                f"the features of one image take {one:,} bytes, and a shard holds {shard_bytes:,}; choose fewer "
                "activations, or set `project`"
            )
        # Whole batches, so that no batch lies across two shards.
        fit = room // one
        per_shard = fit // batch_size * batch_size or fit
        shards += [tuple(members[start : start + per_shard]) for start in range(0, len(members), per_shard)]
    description = _description(extractor, prompts, project, storage, batch_size)
    return Plan(extractor, images, description, tuple(shards), batch_size, storage, prompts)


def write_features(
    folder: Path | str,
    plan: Plan,
    *,
    latents: Path | str | None = None,
    rank: int = 0,
    processes: int = 1,
    progress: Callable[[Iterator[int], int], Iterator[int]] | None = None,
) -> Path:
    """Computes the shards that a folder lacks, and writes the index when all are there; returns the folder.

    Args:
        folder: Place of the features; made if it is not there.
        plan: The extraction, cut into shards.
        latents: Folder that keeps encoded images for later extractions; None keeps none.
        rank: Number of this process among those that share the shards.
        processes: Number of processes that share them.
        progress: Shows how far the loop over missing shards is: takes them and their number.

    Raises:
        MachineError: The disk is full or failing; finished shards are safe.
        RunMismatchError: The folder holds features of other settings or images.
    """
    folder = Path(folder)
    _begin(folder, plan)
    kept = None if latents is None else LatentFolder(latents, plan.extractor.model, plan.extractor.protocol)
    missing = [n for n in range(len(plan.shards)) if not _complete(folder, n, plan.fingerprint)]
    mine = [n for n in missing if n % processes == rank]
    for number in progress(iter(mine), len(mine)) if progress else mine:
        _write_shard(folder, number, plan, kept)
    if all(_complete(folder, number, plan.fingerprint) for number in range(len(plan.shards))):
        _write_index(folder, plan)
    return folder


def _distinct(images: ImageList, prompts: Mapping[str, str] | None) -> list[ListedImage]:
    texts = prompts_of(prompts, images.images) or [""] * len(images.images)
    found: dict[tuple[str, str], ListedImage] = {}
    for image, text in zip(images.images, texts, strict=True):
        found.setdefault((image.sha256, text), image)
    return list(found.values())


def _prepared_size(extractor: FeatureExtractor, image: ListedImage) -> tuple[int, int]:
    protocol = extractor.protocol
    if protocol.mode != "native":
        return extractor.usual_size
    return placed(image.original, protocol.size, mode="native", multiple=multiple_of(extractor.model, "native")).size


def _batch(
    images: ImageList, part: Sequence[ListedImage], extractor: FeatureExtractor, prompts: Mapping[str, str] | None
) -> Batch:
    pixels = images.pictures(part) if extractor.protocol.published else images.read(part)
    return Batch(pixels, [image.key for image in part], prompts_of(prompts, part))


def _description(
    extractor: FeatureExtractor,
    prompts: Mapping[str, str] | None,
    project: str | None,
    storage: Storage,
    batch_size: int,
) -> dict[str, Any]:
    rows = {row.name: row for row in extractor.activations()}
    basis = hashlib.sha256(save(_flat(extractor.projections))).hexdigest() if extractor.projections else None
    return {
        "schema": SCHEMA,
        "model": {
            "name": extractor.model.name,
            "fingerprint": extractor.model.fingerprint,
            "precision": str(extractor.model.dtype).removeprefix("torch."),
        },
        "activations": {
            name: {
                "module": rows[name.partition("@")[0]].site.module,
                "at": rows[name.partition("@")[0]].site.at,
                "channels": extractor.channels(name),
            }
            for name in extractor.names
        },
        "t": list(extractor.t),
        "prompts": sorted(set(prompts.values())) if prompts else [extractor.prompt],
        "protocol": extractor.protocol.to_json(),
        "size": None if extractor.protocol.mode == "native" else list(extractor.usual_size),
        "storage": storage,
        "project": project,
        "basis": basis,
        "batch_size": batch_size,
        "versions": {name: installed_version(name) for name in ("diffusion-featsel", "diffcore", "diffusers", "torch")},
    }


def _flat(projections: Mapping[str, Projection]) -> dict[str, Tensor]:
    return {
        f"{name}/{part}": tensor.contiguous()
        for name, projection in sorted(projections.items())
        for part, tensor in projection.tensors().items()
    }


def _begin(folder: Path, plan: Plan) -> None:
    """Writes the description, or compares it with the one that is there."""
    path = folder / "features.json"
    if path.is_file():
        there = read_trusted(path)
        if there.get("fingerprint") != plan.fingerprint:
            raise RunMismatchError(
                f"{printable(folder, 300)} holds features of {_difference(there, plan)}; use another"
            )
        return
    if plan.extractor.projections:
        files.write_whole(folder / "projections.safetensors", save(_flat(plan.extractor.projections)))
    skipped = [list(pair) for pair in plan.images.skipped]
    counts = {"images": len(plan.images.images), "shards": len(plan.shards)}
    write_json(path, {**plan.description, **counts, "skipped": skipped, "fingerprint": plan.fingerprint})


def _difference(there: Mapping[str, Any], plan: Plan) -> str:
    for key, value in plan.description.items():
        found, wanted = there.get(key), json.loads(json.dumps(value, default=str))
        if found != wanted:
            return f"another {key} ({printable(found)}, not {printable(wanted)})"
    return "other images"


def _write_shard(folder: Path, number: int, plan: Plan, kept: LatentFolder | None) -> None:
    members = plan.shards[number]
    cut = [members[start : start + plan.batch_size] for start in range(0, len(members), plan.batch_size)]
    batches = (_batch(plan.images, part, plan.extractor, plan.prompts) for part in cut)
    parts: dict[str, list[Tensor]] = {}
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    for part, extracted in zip(cut, extract(plan.extractor, batches, latents=kept, storage=plan.storage), strict=True):
        for name, maps in extracted.features.items():
            parts.setdefault(name, []).append(maps)
        rows += [_row(part[place], extracted, place) for place in extracted.rows]
        failed += [{"image": part[place].name, "reason": reason} for place, reason in extracted.failed.items()]
    tensors = {name: _joined(maps) for name, maps in parts.items()}
    # One entry only: the library writes several in random order, and the same tensors must give the same bytes.
    data = save(tensors, metadata={"schema": SCHEMA})
    path = folder / "features" / f"{number:06d}.safetensors"
    files.write_whole(path, data)
    texts = prompts_of(plan.prompts, members)
    prompt_ids = {text: place for place, text in enumerate(plan.description["prompts"])}
    by_name = dict(zip((image.name for image in members), texts, strict=True)) if texts else {}
    for place, row in enumerate(rows):
        row |= {"shard": number, "row": place, "prompt": prompt_ids[by_name[row["image"]]] if by_name else 0}
    mark = {"fingerprint": plan.fingerprint, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    write_json(path.with_suffix(".json"), {**mark, "rows": rows, "failed": failed})


def _joined(maps: Sequence[Tensor]) -> Tensor:
    """Returns the maps of a shard in the widest range that any of its batches needed."""
    wide = torch.bfloat16 if any(part.dtype == torch.bfloat16 for part in maps) else maps[0].dtype
    return torch.cat([part.to(wide) for part in maps]).contiguous()


def _row(image: ListedImage, extracted: Extracted, place: int) -> dict[str, Any]:
    placement = extracted.placements[place]
    return {"image": image.name, "sha256": image.sha256, "key": image.key, **asdict(placement)}


def _complete(folder: Path, number: int, fingerprint: str) -> bool:
    path = folder / "features" / f"{number:06d}.safetensors"
    mark = path.with_suffix(".json")
    if not mark.is_file() or not path.is_file():
        return False
    try:
        stated = read_trusted(mark)
    except CorruptArtifactError:
        return False
    return stated.get("fingerprint") == fingerprint and stated.get("bytes") == path.stat().st_size


def _write_index(folder: Path, plan: Plan) -> None:
    protocol, t = plan.extractor.protocol, list(plan.extractor.t)
    known = {}
    for number in range(len(plan.shards)):
        for row in read_trusted(folder / "features" / f"{number:06d}.json")["rows"]:
            known[row["sha256"], row["prompt"]] = row
    texts = prompts_of(plan.prompts, plan.images.images)
    ids = {text: place for place, text in enumerate(plan.description["prompts"])}
    lines = []
    for place, image in enumerate(plan.images.images):
        row = known.get((image.sha256, ids[texts[place]] if texts else 0))
        if row is not None:
            lines.append(json_line({**row, "image": image.name, "seed": protocol.seed, "t": t}))
    write_text(folder / "index.jsonl", "".join(lines))


@dataclass(frozen=True)
class StoredFeatures:
    """Features that were extracted to a folder; reading one activation of one image touches its bytes alone.

    Attributes:
        folder: The folder that holds them.
        description: Content of its `features.json`.
        index: One row per image file: shard, row, and where the image lies in the network's input.
    """

    folder: Path
    description: Mapping[str, Any]
    index: tuple[Mapping[str, Any], ...]
    _places: Mapping[str, int] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, folder: Path | str) -> "StoredFeatures":
        """Opens a folder that `write_features` filled.

        Raises:
            CorruptArtifactError: A file is missing or damaged.
            RunMismatchError: A shard belongs to another extraction.
            UserError: The extraction is not finished.
        """
        folder = Path(folder)
        description = read_trusted(folder / "features.json")
        if description.get("schema") != SCHEMA:
            raise CorruptArtifactError(
                f"{printable(folder, 300)} holds {printable(description.get('schema'))}, not {SCHEMA}"
            )
        if not (folder / "index.jsonl").is_file():
            raise UserError(
                f"{printable(folder, 300)} holds an extraction that is not finished; run it again to resume"
            )
        for number in range(int(description["shards"])):
            mark = read_trusted(folder / "features" / f"{number:06d}.json")
            if mark.get("fingerprint") != description["fingerprint"]:
                raise RunMismatchError(
                    f"shard {number:06d} in {printable(folder, 300)} is of another extraction; delete it"
                )
        lines = files.read(folder / "index.jsonl").decode().splitlines()
        index = tuple(json.loads(line) for line in lines)
        return cls(folder, description, index, {row["image"]: place for place, row in enumerate(index)})

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the activations, in the order in which they were asked for."""
        return tuple(self.description["activations"])

    @property
    def images(self) -> tuple[str, ...]:
        """Names of the image files."""
        return tuple(self._places)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def failed(self) -> dict[str, str]:
        """Reason by image file, for images of which an activation was not a number; they are not in the index."""
        marks = (self._shard(number).with_suffix(".json") for number in range(int(self.description["shards"])))
        return {row["image"]: row["reason"] for mark in marks for row in read_trusted(mark)["failed"]}

    def read(self, name: str, image: str | int) -> Tensor:
        """Returns one activation of one image as a map (c, h, w), in its stored precision.

        Args:
            name: Name of the activation.
            image: Name of the image file, or its number in the index.

        Raises:
            KeyError: There is no such activation or image.
        """
        if name not in self.names:
            raise KeyError(f"no activation {name!r} is stored; there are {', '.join(self.names)}")
        if isinstance(image, str) and image not in self._places:
            raise KeyError(f"no image {image!r} is stored")
        row = self.index[self._places[image] if isinstance(image, str) else image]
        with safe_open(self._shard(int(row["shard"])), framework="pt") as opened:
            return opened.get_slice(name)[int(row["row"])]

    def maps(self, name: str, images: Sequence[str | int] | None = None) -> Tensor:
        """Returns one activation of images of one size, as maps (n, c, h, w).

        Args:
            name: Name of the activation.
            images: Names or numbers of images; by default all, in the order of the index.
        """
        return torch.stack([self.read(name, image) for image in (range(len(self)) if images is None else images)])

    def projections(self) -> dict[str, Projection]:
        """Returns the projections that features went through; empty where there are none."""
        path = self.folder / "projections.safetensors"
        if not path.is_file():
            return {}
        tensors = load_file(path)
        names = dict.fromkeys(key.rpartition("/")[0] for key in tensors)
        return {
            name: Projection.of_tensors({part: tensors[f"{name}/{part}"] for part in ("mean", "basis", "explained")})
            for name in names
        }

    def verify(self) -> None:
        """Compares every shard with the digest that was noted when it was written.

        Raises:
            CorruptArtifactError: A shard is truncated or altered.
        """
        for number in range(int(self.description["shards"])):
            stated = read_json(self.folder / "features" / f"{number:06d}.json")["sha256"]
            if files.sha256(self._shard(number)) != stated:
                raise CorruptArtifactError(
                    f"{printable(self._shard(number), 300)} was altered; delete it and extract again"
                )

    def _shard(self, number: int) -> Path:
        return self.folder / "features" / f"{number:06d}.safetensors"
