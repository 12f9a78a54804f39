"""What invert reads, computes, writes and keeps: pictures by subject, and what is found for each."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffcore.adapters import Base, Format
from diffcore.digests import digest_of_values
from diffcore.errors import UserError, printable
from diffcore.io import files
from diffcore.models import DiffusionModel
from diffcore.run import Run
from diffcore.units import Map
from w2w_space.app.report_training import save_drawn_subjects, save_inversion_parts
from w2w_space.app.subjects import require_whole
from w2w_space.baseline import free_adapters
from w2w_space.directions import Directions
from w2w_space.draw import Drawing
from w2w_space.files.export import export_point, export_vector
from w2w_space.files.points import save_point
from w2w_space.files.subjects import open_mask, open_pictures
from w2w_space.instance import Instance
from w2w_space.invert import Inversion, InversionSettings, default_components, fixed_losses, invert
from w2w_space.locate import Located, locate
from w2w_space.pictures import Framed, condition_of, framed
from w2w_space.refine import Refined, refine
from w2w_space.space import WeightSpace

_LOG = logging.getLogger(__name__)
_NOT_IN_NAMES = set('/\\:*?"<>|')


@dataclass(frozen=True, eq=False)
class OneSubject:
    """A subject before it is encoded.

    Attributes:
        name: Name of the subject.
        shown: Its pictures as the model sees them.
        labels: Class of each picture, or one for all; empty for models that draw no classes.
    """

    name: str
    shown: Framed
    labels: tuple[int, ...]

    def encoded(self, model: DiffusionModel, prompt: str | None, size: int | None) -> Instance:
        """Returns the subject as the search takes it.

        Args:
            model: Model whose codec encodes the pictures.
            prompt: Prompt of the population's members; None for models that take none.
            size: Side of the pictures in pixels.
        """
        condition = condition_of(model, prompt=prompt, class_labels=self.labels, size=size)
        return Instance.encoded(model, self.shown, self.name, condition)


@dataclass(frozen=True, eq=False)
class Given:
    """Pictures of a command line with their masks, grouped by subject.

    Attributes:
        groups: Name of each subject with the places of its pictures.
        images: Pictures of all subjects.
        masks: Mask of each picture; None without masks.
        labels: Class of each picture; empty where none is named.
        digests: Digests of the files, by name.
        skipped: Name and reason of each file that is left out.
    """

    groups: tuple[tuple[str, tuple[int, ...]], ...]
    images: tuple[Image.Image, ...]
    masks: tuple[Image.Image, ...] | None
    labels: tuple[int, ...]
    digests: Mapping[str, str]
    skipped: tuple[tuple[str, str], ...]

    @classmethod
    def of(
        cls, paths: Sequence[Path], masks: Sequence[Path], *, each: bool, name: str | None, class_label: Sequence[int]
    ) -> "Given":
        """Returns the pictures that a command line names, each read whole.

        Args:
            paths: Picture files, and folders of such.
            masks: Mask of each picture; empty without masks.
            each: Whether every picture is a subject of its own.
            name: Name of the one subject; by default that of the first picture or folder.
            class_label: Class of all pictures or of each; empty for models that draw no classes.

        Raises:
            UserError: Pictures, masks and classes do not go together, or two subjects have one name.
        """
        if each and name is not None:
            raise UserError("`name` is the name of one subject; leave it out with `each`")
        found, skipped = open_pictures(paths)
        count = f"{len(found)} usable pictures"
        if masks and len(masks) != len(found):
            raise UserError(f"there are {len(masks)} masks for {count}; give one `mask` for each, in their order")
        if len(class_label) not in (0, 1, len(found)):
            raise UserError(
                f"there are {len(class_label)} classes for {count}; give one `class_label`, or one for each"
            )
        if each:
            groups = [(one.path.stem, (place,)) for place, one in enumerate(found)]
            _require_names_of_their_own([(one.path.stem, one.path) for one in found])
        else:
            first = paths[0].name if paths[0].is_dir() else found[0].path.stem
            groups = [(name or first, tuple(range(len(found))))]
        for word, _ in groups:
            if not word or set(word) & _NOT_IN_NAMES or word in (".", ".."):
                raise UserError(f"{printable(word)!r} cannot be the name of a file; give another `name`")
        digests = {"pictures": digest_of_values([one.sha256 for one in found])}
        if masks:
            digests["masks"] = digest_of_values([files.sha256(mask) for mask in masks])
        return cls(
            tuple(groups),
            tuple(one.image for one in found),
            tuple(open_mask(mask) for mask in masks) if masks else None,
            tuple(class_label) * (len(found) if len(class_label) == 1 else 1),
            digests,
            tuple(skipped),
        )

    def framed(self, model: DiffusionModel, prompt: str | None, size: int | None) -> list[OneSubject]:
        """Returns the subjects with their pictures as the model sees them.

        Args:
            model: Base model of the space.
            prompt: Prompt of the population's members; None for models that take none.
            size: Side of the pictures in pixels.

        Raises:
            UserError: Prompt, classes or masks do not suit the model or the pictures.
        """
        condition_of(model, prompt=prompt, class_labels=self.labels, size=size)
        if prompt is not None:
            require_whole(model, [prompt])
        found = []
        for name, places in self.groups:
            masks = None if self.masks is None else [self.masks[i] for i in places]
            shown = framed(model, [self.images[i] for i in places], masks, size=size)
            found.append(OneSubject(name, shown, tuple(self.labels[i] for i in places) if self.labels else ()))
        return found


def _require_names_of_their_own(named: Sequence[tuple[str, Path]]) -> None:
    known = dict[str, Path]()
    for name, path in named:
        # File systems that fold case would write two subjects into one file.
        other = known.setdefault(name.casefold(), path)
        if other is not path:
            raise UserError(
                f"{printable(other, 300)} and {printable(path, 300)} are two subjects of one name, "
                f"{printable(name)!r}; rename one, or invert them one after the other"
            )


def foreign(details: Mapping[str, Any], model: DiffusionModel) -> list[str]:
    """Returns a warning where a space was made on other weights of the same layers.

    Args:
        details: Plain values beside the space.
        model: Model of the command line.
    """
    made_on = details.get("model_fingerprint")
    if made_on is None or made_on == model.fingerprint:
        return []
    note = (
        f"The space's members were trained on other weights than those of {printable(model.name)}: their layers agree, "
        "and points may mean something else."
    )
    _LOG.warning("%s", note)
    return [note]


def digest_of_directions(known: Directions) -> str:
    """Returns a digest of what directions tell about a point.

    Args:
        known: Directions of a space.
    """
    return digest_of_values([[row.name, row.axis.tolist(), row.std] for row in known.rows])


def components_of(space: WeightSpace, settings: InversionSettings) -> int:
    """Returns the number of components that move.

    Args:
        space: Space that is searched.
        settings: Settings of the search.

    Raises:
        UserError: The space has fewer, or there are none.
    """
    m = settings.num_components
    if m is None:
        return default_components(space, settings.component_share)
    if not 1 <= m <= space.num_components:
        raise UserError(f"`num_components` is {m}; the space has {space.num_components}")
    return m


@dataclass(frozen=True, eq=False)
class Found:
    """What was found for each subject, with what it is compared with.

    Attributes:
        space: Space that was searched.
        model: Base model of the space.
        subjects: Subjects with their encoded pictures.
        settings: Settings of the search.
        inversion: Points and their losses.
        located: Where each point lies.
        base_losses: Loss of the base model alone on the fixed pairs.
        vectors: Vectors of each kind of adapter, "found" first, one for each subject.
        losses: Loss of each kind of adapter besides, on the same pairs.
        refined: Adapters that left the space a little; None where that was not asked for.
    """

    space: WeightSpace
    model: DiffusionModel
    subjects: Sequence[Instance]
    settings: InversionSettings
    inversion: Inversion
    located: tuple[Located, ...]
    base_losses: Tensor
    vectors: Mapping[str, Tensor]
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    refined: Refined | None = None

    @classmethod
    def search(
        cls,
        space: WeightSpace,
        model: DiffusionModel,
        subjects: Sequence[Instance],
        settings: InversionSettings,
        map: Map,
        *,
        group_size: int,
        baseline: bool,
        radius: float | None,
        directions: Directions | None,
    ) -> "Found":
        """Searches, refines and trains free adapters, whichever is asked for.

        Args:
            space: Space that is searched.
            model: Base model of the space.
            subjects: Subjects with their encoded pictures.
            settings: Settings of the search.
            map: Map over subjects that keeps what is finished.
            group_size: Number of searches in one forward pass.
            baseline: Whether to train free adapters, too.
            radius: Largest departure of refined adapters; None refines none.
            directions: Directions of the space, by which points are described.
        """
        together: dict[str, Any] = {"group_size": group_size, "map": map}
        found = invert(space, model, subjects, settings, **together)
        vectors, losses = {"found": torch.stack([point.vector for point in found.points])}, dict[str, Tensor]()
        refined = None
        if radius is not None:
            refined = refine(found.points, model, subjects, settings, radius=radius, **together)
            vectors["refined"], losses["refined"] = refined.vectors, refined.losses
        if baseline:
            free = free_adapters(space.layout, model, subjects, settings, **together)
            rows = torch.stack([member.vector.float() for member in free])
            vectors["free adapter"] = rows
            losses["free adapter"] = fixed_losses(space.layout, model, subjects, rows, settings, group_size=group_size)
        base = fixed_losses(space.layout, model, subjects, None, settings, group_size=group_size)
        m = components_of(space, settings)
        located = tuple(locate(p, directions, num_components=m, settings=settings) for p in found.points)
        return cls(space, model, subjects, settings, found, located, base, vectors, losses, refined)

    @property
    def names(self) -> list[str]:
        """Names of the subjects."""
        return [subject.name for subject in self.subjects]

    def outside(self) -> list[str]:
        """Returns a sentence about each subject that the space does not hold."""
        found = []
        for i, (name, where) in enumerate(zip(self.names, self.located, strict=True)):
            base, loss = float(self.base_losses[i]), float(self.inversion.losses[i])
            if not loss < base:
                found.append(
                    f"{name} lies outside the space: no point on the way was better than the base model (loss "
                    f"{loss:.4g} beside {base:.4g}). Likely reasons are pictures of another kind, or another prompt "
                    "than the members'."
                )
            elif where.at_bound:
                found.append(
                    f"{name} lies at the bound of the search, {where.length:.1f} standard deviations from the mean: "
                    "the members are not like it. Fewer components or a stronger prior keep it a usual member."
                )
        return found

    def write(self, folder: Path, format: Format, base: Base) -> None:
        """Writes each subject's adapters and its point.

        Args:
            folder: Run folder, which holds adapters and points afterwards.
            format: Layout of the adapters.
            base: Model that the adapters are for.
        """
        for below in ("adapters", "points"):
            with files.explained(folder):
                files.make_folder(folder / below)
        ending = "" if format == "peft" else ".safetensors"
        for i, (name, point) in enumerate(zip(self.names, self.inversion.points, strict=True)):
            save_point(point, folder / "points" / f"{name}.safetensors", name=name, source="invert")
            # The run owns its folder: what an interrupted command left is replaced.
            export_point(
                point,
                folder / "adapters" / f"{name}{ending}",
                format=format,
                base=base,
                overwrite=True,
                card={"subject": name, "base": self.model.name},
            )
            for kind in list(self.vectors)[1:]:
                path = folder / "adapters" / f"{name}-{kind.split()[0]}{ending}"
                vector = self.vectors[kind][i]
                export_vector(self.space.layout, vector, path, format=format, base=base, overwrite=True)

    def keep(
        self, run: Run, drawing: Drawing | None, notes: Sequence[str], skipped: Sequence[tuple[str, str]]
    ) -> dict[str, Any]:
        """Keeps what the report shows, and returns the summary.

        Args:
            run: Run of the command.
            drawing: Prompts or classes that the report shows pictures of; None for no pictures.
            notes: Sentences for people, such as that a subject lies outside.
            skipped: Name and reason of each picture that was left out.
        """
        save_inversion_parts(
            run,
            self.names,
            self.inversion,
            self.located,
            self.base_losses,
            self.settings,
            free_losses=self.losses.get("free adapter"),
            refined_losses=self.losses.get("refined"),
            departures=None if self.refined is None else self.refined.departures,
            skipped=skipped,
            notes=notes,
        )
        if drawing is not None:
            vectors = {kind: list(rows) for kind, rows in self.vectors.items()}
            mean = self.space.mean
            save_drawn_subjects(run, self.model, self.space.layout, self.subjects, vectors, mean, drawing)
        return {
            "answer": self._answer(),
            "components": components_of(self.space, self.settings),
            "subjects": {name: self._row(i) for i, name in enumerate(self.names)},
            "notes": list(notes),
            "left_out": [list(pair) for pair in skipped],
            "adapters": run.folder / "adapters",
        }

    def _row(self, i: int) -> dict[str, Any]:
        found, where = self.inversion, self.located[i]
        told = {
            "loss": float(found.losses[i]),
            "loss_of_mean": float(found.start_losses[i]),
            "loss_of_base": float(self.base_losses[i]),
            **{f"loss_of_{kind.replace(' ', '_')}": float(losses[i]) for kind, losses in self.losses.items()},
            "removed": float(1 - found.losses[i] / self.base_losses[i]),
            "distance_from_mean": where.length,
            "percentile": None if where.percentile != where.percentile else where.percentile,
            "at_bound": where.at_bound,
            "nearest_members": [f"{near} ({distance:.2f})" for near, distance in where.nearest],
        }
        if where.words:
            told["description"] = where.words
        if self.refined is not None:
            told |= {"departure": float(self.refined.departures[i]), "outside": float(self.refined.outside[i])}
        return told

    def _answer(self) -> str:
        removed = 1 - self.inversion.losses / self.base_losses
        if len(self.subjects) > 1:
            return (
                f"{len(self.subjects)} subjects were found; the median adapter removes {float(removed.median()):.1%} "
                "of the base model's loss on its pictures."
            )
        where, mean = self.located[0], float(1 - self.inversion.start_losses[0] / self.base_losses[0])
        near = f", nearest to {where.nearest[0][0]}" if where.nearest else ""
        return (
            f"The found adapter removes {float(removed[0]):.1%} of the base model's loss on these pictures, the mean "
            f"of the space {mean:.1%}; it lies {where.length:.1f} standard deviations from the mean{near}."
        )
