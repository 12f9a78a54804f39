"""What train reads, writes and keeps: subjects with their labels, the population, and what its report shows."""

import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import Any

import torch

from diffcore.adapters import Format
from diffcore.cli import track
from diffcore.errors import UserError, printable
from diffcore.io import files
from diffcore.io.jsonfile import write_text
from diffcore.models import DiffusionModel
from diffcore.run import Run
from diffcore.units import Map
from diffcore.zoo.digits.data import DIGITS, STYLES
from w2w_space.app.options_training import DrawingOptions, PriorOptions
from w2w_space.app.report_training import save_drawn_members, save_training_parts
from w2w_space.app.subjects import Read, conditions, read_subjects, require_classes
from w2w_space.files.export import export_vector
from w2w_space.files.labels import labels_text, read_label_rows
from w2w_space.files.population import FILE, LABELS, MEMBERS, SHARDS, Member, PopulationFolder, Skipped
from w2w_space.files.subjects import Subjects, list_class, list_subjects
from w2w_space.instance import Instance
from w2w_space.layout import Layout
from w2w_space.pictures import condition_of, picture_format, takes_classes
from w2w_space.recipe import Recipe
from w2w_space.styles import MEMBERS as ALL_STYLES
from w2w_space.styles import MODEL as STYLES_NAME
from w2w_space.styles import style_instances, style_labels
from w2w_space.train_population import Trained

_LOG = logging.getLogger(__name__)
_SHOWN = 4


@dataclass(frozen=True, eq=False)
class Sources:
    """Where subjects come from: pictures in sub-folders, or the zoo's styles; and pictures of the class.

    Attributes:
        listed: Subjects with their pictures; None for the zoo's styles.
        of_class: Pictures of the class; None without prior preservation.
        count: Number of styles of the zoo.
        labels: Rows of the table of labels, the header first; None without labels.
    """

    listed: Subjects | None
    of_class: Subjects | None = None
    count: int = 0
    labels: list[list[str]] | None = None

    @classmethod
    def of(cls, instances: str, prior: PriorOptions, num_members: int | None) -> "Sources":
        """Returns the sources that a command line names, before any picture is read.

        Args:
            instances: Folder or zip archive of subjects, or zoo:digits-styles.
            prior: Options that name the pictures of the class.
            num_members: Number of subjects that are taken; None takes all.

        Raises:
            UserError: There are no subjects, or labels cannot be read.
        """
        if instances.startswith("zoo:"):
            return cls._styles(instances, prior, num_members)
        listed = list_subjects(instances).first(num_members)
        of_class = None if prior.class_images is None else list_class(prior.class_images)
        table = Path(instances) / LABELS
        return cls(listed, of_class, labels=list(read_label_rows(table).values()) if table.is_file() else None)

    @classmethod
    def _styles(cls, instances: str, prior: PriorOptions, num_members: int | None) -> "Sources":
        if instances != STYLES_NAME:
            raise UserError(f"there are no subjects {printable(instances)}; give a folder, or {STYLES_NAME}")
        if prior.class_images is not None:
            raise UserError(f"{STYLES_NAME} has no pictures of a class; leave out `class_images`")
        count = ALL_STYLES if num_members is None else num_members
        if count < 1:
            raise UserError(f"`num_members` is {count}; give at least 1")
        named = zip(style_instances(style_labels(count)), style_labels(count).tolist(), strict=True)
        rows = [[each.name, *(f"{number:.4f}" for number in style)] for each, style in named]
        return cls(None, None, count, [["adapter", *STYLES], *rows])

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the subjects."""
        if self.listed is None:
            return tuple(row[0] for row in (self.labels or [])[1:])
        return tuple(each.name for each in self.listed.subjects)

    def require_free(self, folder: Path, format: Format) -> None:
        """Refuses a folder that holds files of the subjects' names, before anything is trained.

        Args:
            folder: Folder that members shall be written to.
            format: Layout of the files.

        Raises:
            UserError: A file is there already.
        """
        taken = [path for name in self.names if (path := adapter_path(folder, name, format)).exists()]
        if taken:
            raise UserError(
                f"{printable(taken[0], 300)} is there already; give another folder to `export`, or allow to "
                "`overwrite` it"
            )

    @property
    def digests(self) -> dict[str, str]:
        """Digest of each source by its name."""
        if self.listed is None:
            return {STYLES_NAME: str(self.count)}
        found = {"instances": self.listed.digest}
        return found if self.of_class is None else {**found, "class images": self.of_class.digest}

    def require(
        self,
        model: DiffusionModel,
        prompt: str | None,
        class_label: int | None,
        class_prompt: str | None,
        size: int | None,
    ) -> None:
        """Refuses prompts, classes and sizes that do not suit the model, before anything is computed.

        Args:
            model: Model that is trained.
            prompt: Prompt of all subjects; None for models that take none.
            class_label: Class of all pictures; None where folders name it, or the model takes none.
            class_prompt: Prompt of the class; None without prior preservation, or for models that take none.
            size: Side of the pictures in pixels.

        Raises:
            UserError: What the model takes is missing, or what it does not take is given.
        """
        if self.listed is None:
            if size is not None:
                raise UserError(f"{STYLES_NAME} has pictures of one size; leave out `size`")
            condition_of(model, prompt=prompt, class_labels=range(len(DIGITS)))
            return
        picture_format(model, size)
        require_classes(model, self.listed, class_label)
        if class_label is not None or not takes_classes(model):
            conditions(model, prompt, class_label, None)
        if self.of_class is None:
            return
        if model.prompts is not None and class_prompt is None:
            raise UserError('pictures of the class need a `class_prompt`, such as "a photo of a person"')
        if model.prompts is None and class_prompt is not None:
            raise UserError(f"{printable(model.name)} takes no prompts; leave out `class_prompt`")
        require_classes(model, self.of_class, class_label)

    def read(
        self, model: DiffusionModel, prompt: str | None, class_label: int | None, size: int | None, map: Map
    ) -> Read:
        """Returns the subjects with their encoded pictures.

        Args:
            model: Model that is trained.
            prompt: Prompt of all subjects.
            class_label: Class of all pictures.
            size: Side of the pictures in pixels.
            map: Map over subjects that keeps what is finished.
        """
        if self.listed is None:
            return Read(tuple(style_instances(style_labels(self.count))), (), ())
        return read_subjects(model, self.listed, prompt=prompt, class_label=class_label, size=size, map=map)

    def read_class(
        self, model: DiffusionModel, prompt: str | None, class_label: int | None, size: int | None, map: Map
    ) -> Instance | None:
        """Returns the pictures of the class; None without prior preservation.

        Args:
            model: Model that is trained.
            prompt: Prompt of the class.
            class_label: Class of all pictures.
            size: Side of the pictures in pixels.
            map: Map that keeps the encoded pictures.
        """
        if self.of_class is None:
            return None
        read = read_subjects(model, self.of_class, prompt=prompt, class_label=class_label, size=size, map=map)
        return read.instances[0]

    def plan(self, layout: Layout, recipe: Recipe, *, group_size: int, num_pairs: int) -> dict[str, Any]:
        """Returns what would be done: members, numbers, steps, and rows that go through the network.

        Args:
            layout: Table of the members' vectors.
            recipe: Recipe of all members.
            group_size: Number of members that are trained together.
            num_pairs: Number of pairs on which each member's loss is measured.
        """
        told = {"members": self.count, "pictures": len(DIGITS) * self.count}
        if self.listed is not None:
            pictures = sum(len(each.pictures) for each in self.listed.subjects)
            told = {"members": len(self.listed.subjects), "pictures": pictures, "left_out": len(self.listed.skipped)}
        members, rows = told["members"], recipe.batch_size
        if self.of_class is not None:
            told["class_images"] = len(self.of_class.source.names)
            rows *= 2
        return {
            **told,
            "modules": len(layout.modules),
            "numbers_per_member": layout.size,
            "steps": recipe.steps,
            "groups": -(-members // group_size),
            "rows_per_forward_pass": min(members, group_size) * rows,
            "rows_with_gradient": members * recipe.steps * rows,
            "rows_without": 2 * members * num_pairs,
            "megabytes": round(members * layout.size * 4 / 1e6, 1),
        }


def write_population(
    folder: Path,
    layout: Layout,
    model: DiffusionModel,
    trained: Sequence[Trained],
    skipped: Sequence[tuple[str, str]],
    facts: Mapping[str, Any],
) -> PopulationFolder:
    """Returns the population of the members that did not fail, once it is on disk.

    What an interrupted command left of it is written anew: the run holds every member's vector.

    Args:
        folder: Run folder, which becomes the folder of the population.
        layout: Table of the members' vectors.
        model: Base model of the members.
        trained: Members, failed ones among them.
        skipped: Name and reason of each file and folder that was left out.
        facts: Plain values about how the members were trained.
    """
    with files.explained(folder):
        for name in (FILE, MEMBERS):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / SHARDS, ignore_errors=True)
    population = PopulationFolder.create(folder, layout, model.adapter_base, **facts)
    kept = [member for member in trained if not member.failed]
    members = [
        Member(
            member.name,
            rank=layout.rank,
            trained_on=model.name,
            notes=(f"trained here: loss {member.base_loss:.4g} of the base, {member.loss:.4g} with the adapter",),
        )
        for member in kept
    ]
    left_out = [Skipped(each.name, f"training failed twice: {_failure(each)}") for each in trained if each.failed]
    left_out += [Skipped(name, reason) for name, reason in skipped]
    vectors = torch.stack([member.vector.float() for member in kept]) if kept else torch.zeros(0, layout.size)
    return population.append(vectors, members, left_out)


def write_labels(folder: Path, rows: list[list[str]] | None, names: Sequence[str]) -> None:
    """Writes the labels of a population's members beside it; labels of others are told and left out.

    Args:
        folder: Folder of the population.
        rows: Rows of the table of labels, the header first; None without labels.
        names: Names of the members.
    """
    if rows is None:
        return
    write_text(folder / LABELS, labels_text(rows, names))
    if unknown := sorted({row[0] for row in rows[1:]} - set(names)):
        _LOG.warning("labels of %d others than members, such as %s, were left out", len(unknown), printable(unknown[0]))


def write_adapters(population: PopulationFolder, folder: Path, format: Format, *, overwrite: bool) -> None:
    """Writes each member of a population as a LoRA file.

    Args:
        population: Population as it is on disk.
        folder: Place of the files, one for each member.
        format: Layout of the files.
        overwrite: Whether files that are there already may be replaced.
    """
    with files.explained(folder):
        files.make_folder(folder)
    for place, name in enumerate(track(population.names, "writing adapters")):
        vector, path = population.rows([place])[0], adapter_path(folder, name, format)
        export_vector(population.layout, vector, path, format=format, base=population.base, overwrite=overwrite)


def adapter_path(folder: Path, name: str, format: Format) -> Path:
    """Returns the place of a member's file, or of its folder in PEFT's layout.

    Args:
        folder: Folder of all members.
        name: Name of the member.
        format: Layout of the files.
    """
    return folder / (name if format == "peft" else f"{name}.safetensors")


def kept(
    run: Run,
    model: DiffusionModel,
    layout: Layout,
    read: Read,
    trained: Sequence[Trained],
    drawing: DrawingOptions,
    prompt: str | None,
    size: int | None,
) -> dict[str, Any]:
    """Keeps what the report shows, and returns the summary.

    Args:
        run: Run of the command.
        model: Base model of the members.
        layout: Table of the members' vectors.
        read: Subjects that members were trained on.
        trained: Members, failed ones among them.
        drawing: Options that say what the report shows.
        prompt: Prompt of all subjects; None for models that take none.
        size: Side of the pictures in pixels.
    """
    save_training_parts(run, trained, read.skipped, read.notes)
    whole = [member for member in trained if not member.failed]
    shown, by_name = whole[:_SHOWN], {each.name: each for each in read.instances}
    what = drawing.of(prompt, [by_name[member.name] for member in shown], size)
    if what is not None and shown:
        save_drawn_members(run, model, layout, shown, [by_name[member.name] for member in shown], what)
    weak = [member.name for member in whole if not member.beats_base]
    gain = median_low([member.gain for member in whole]) if whole else None
    return {
        "answer": _answer(len(trained), len(whole), gain, len(weak)),
        "members": len(whole),
        "numbers": layout.size,
        "median_gain": gain,
        "median_loss": median_low([member.loss for member in whole]) if whole else None,
        "median_base_loss": median_low([member.base_loss for member in whole]) if whole else None,
        "trained_again": [member.name for member in trained if member.rate < 1],
        "failed": [member.name for member in trained if member.failed],
        "no_better_than_base": weak,
        "left_out": [list(pair) for pair in read.skipped],
        "notes": list(read.notes),
    }


def _answer(count: int, whole: int, gain: float | None, weak: int) -> str:
    if gain is None:
        return f"The training of all {count} members failed; lower the learning rate."
    found = f"{whole} of {count} adapters were trained; the median one removes {gain:.1%} of the base model's loss."
    return f"{found} {weak} do not beat the base model by more than the noise." if weak else found


def _failure(member: Trained) -> str:
    if not math.isfinite(member.loss):
        return "its loss is not finite"
    return f"its loss is {member.loss:.4g}, that of the base {member.base_loss:.4g}"
