"""A subject with sliders: what the local page shows and writes, without the page.

A picture of the subject and one of the subject after its edits start from the same noise, so that what differs is the
edit. Nothing is loaded or downloaded here; files are written into one folder alone.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from diffcore.adapters import Base
from diffcore.errors import UserError, printable
from diffcore.models import DiffusionModel
from diffcore.models.codec import PixelCodec
from diffcore.models.generation import generate
from w2w_space.directions import Direction, Directions
from w2w_space.edit import Edit, edit
from w2w_space.files.export import Exported, export_point
from w2w_space.sample import described, sample
from w2w_space.slider import useful_places
from w2w_space.space import Point, WeightSpace

MEAN = "mean"
_COMPONENTS = 6  # that have a slider where there are no directions
_CLIP = 1.2  # bound of what pixel models predict
_SHOWN = 384  # pixels, the side to which small pictures are enlarged
_KEPT = 64  # pictures that are kept for moves back and forth
_REACH = 3.0  # standard deviations that every slider goes at least
_NAME = re.compile(r"[^\w. -]+")


@dataclass(frozen=True)
class Knob:
    """One slider of the page.

    Attributes:
        name: Attribute that it moves.
        reach: Largest strength in standard deviations, on both sides.
        useful: Places on its axis between which members lie.
        note: Sentence that says how far it can be trusted.
    """

    name: str
    reach: float
    useful: tuple[float, float]
    note: str


@dataclass(frozen=True)
class Scene:
    """How a picture is drawn, apart from the adapter.

    Attributes:
        prompt: Text for models that take prompts.
        label: Class for models that take classes.
        seed: Seed of the noise that it starts from.
        steps: Number of solver steps.
        guidance_scale: Strength of guidance, for models that take prompts; 1 is off.
        size: Side in pixels; None is what the model was trained for.
    """

    prompt: str = ""
    label: int = 0
    seed: int = 0
    steps: int = 20
    guidance_scale: float = 1.0
    size: int | None = None


class Studio:
    """A space with its model and sliders.

    Attributes:
        model: Diffusion model that draws the pictures.
        space: Space of its adapters.
        knobs: Sliders in their order.
    """

    def __init__(
        self, model: DiffusionModel, space: WeightSpace, base: Base, directions: Directions | None = None
    ) -> None:
        """Checks that all belong together.

        Args:
            model: Diffusion model that draws the pictures.
            space: Space of its adapters.
            base: Weights that the adapters of the space change, for their files.
            directions: Directions of the space; without them the leading components have sliders.

        Raises:
            UserError: The directions belong to another space, or the model lacks a module of the space.
        """
        self.model, self.space, self._base = model, space, base
        self._directions = _components(space) if directions is None else directions
        if self._directions.space != space.fingerprint:
            raise UserError("the directions belong to another space; find them in this one")
        ours = model.adapter_base.shapes["backbone"]
        for module, shape in zip(space.layout.modules, space.layout.shapes, strict=True):
            if tuple(ours.get(module, ())) != tuple(shape):
                raise UserError(
                    f"{printable(model.name)} has no {module!r} of shape {tuple(shape)}, which the space changes; give "
                    "the model that the space was built for"
                )
        self.knobs = tuple(self._knob(row, found=directions is not None) for row in self._directions.rows)
        self._drawn = lru_cache(_KEPT)(self._draw)

    @property
    def subjects(self) -> tuple[str, ...]:
        """Names that can be chosen: the mean, a new subject drawn at random, and the members."""
        return (MEAN, "random 0", "random 1", "random 2", *self.space.names)

    @property
    def takes_prompts(self) -> bool:
        """Whether pictures are asked for in words, and not by class."""
        return self.model.prompts is not None

    @property
    def num_classes(self) -> int:
        """Number of classes of a model that takes them; 0 for others."""
        config = getattr(self.model.backbone, "config", {})
        for name in ("num_class_embeds", "num_embeds_ada_norm"):
            if not self.takes_prompts and config.get(name):
                return int(config[name])
        return 0

    def subject(self, name: str) -> Point:
        """Returns the point of a name that can be chosen.

        Args:
            name: Subject, one of those in `subjects`.

        Raises:
            UserError: There is no such subject.
        """
        if name == MEAN:
            return self.space.point()
        if match := re.fullmatch(r"random (\d+)", name):
            return sample(self.space, 1, seed=int(match[1]))[0].point
        return self.space.member(name)

    def edited(self, name: str, strengths: Mapping[str, float], keep: Sequence[str] = ()) -> Edit:
        """Returns a subject after the moves of the sliders.

        Args:
            name: Subject, one of those in `subjects`.
            strengths: Strength of each slider in standard deviations; those at 0 do nothing.
            keep: Attributes whose scores stay as they are; those that are moved are not kept.
        """
        moved = {name: strength for name, strength in strengths.items() if strength}
        return edit(self.subject(name), moved, self._directions, keep=[k for k in keep if k not in moved])

    def pictures(
        self, name: str, strengths: Mapping[str, float], scene: Scene, keep: Sequence[str] = ()
    ) -> tuple[Image.Image, Image.Image]:
        """Returns pictures of a subject before and after the moves of the sliders, from the same noise.

        Args:
            name: Subject, one of those in `subjects`.
            strengths: Strength of each slider in standard deviations.
            scene: How the pictures are drawn.
            keep: Attributes whose scores stay as they are.
        """
        before, after = self.subject(name), self.edited(name, strengths, keep).point
        return self._drawn(tuple(before.z.tolist()), scene), self._drawn(tuple(after.z.tolist()), scene)

    def words(self, done: Edit) -> str:
        """Returns what is known of an edited subject, in Markdown: places, distances, and warnings.

        Args:
            done: Edit of a subject.
        """
        space, point = self.space, done.point
        rows = ["| attribute | before, sd | after, sd | percentile |", "|---|---:|---:|---:|"]
        rows += [
            f"| {_plain(p.name)} | {p.before:+.2f} | {p.after:+.2f} | "
            f"{'–' if p.percentile != p.percentile else f'{p.percentile:.0f}'} |"
            for p in done.places
        ]
        told = f"{point.length:.1f} standard deviations from the mean, of {space.num_components} components"
        if space.names:
            found = described(space, point.z[None])[0]
            told += f"; nearest member: {_plain(found.nearest)} ({found.distance:.1f} sd)"
        warnings = [f"- ⚠ {_plain(warning)}" for warning in done.warnings]
        return "\n".join([*rows, "", told + ".", "", *warnings])

    def export(
        self, folder: Path, file: str, name: str, strengths: Mapping[str, float], keep: Sequence[str] = ()
    ) -> Exported:
        """Writes the edited subject as a LoRA in a folder, and returns what was written.

        Args:
            folder: Folder for the file.
            file: Name of the file; signs that are no part of names are left out.
            name: Subject, one of those in `subjects`.
            strengths: Strength of each slider in standard deviations.
            keep: Attributes whose scores stay as they are.

        Raises:
            UserError: The name says nothing, or there is such a file already.
        """
        stem = _NAME.sub("", file.strip().removesuffix(".safetensors")).strip(". ")
        if not stem:
            raise UserError("the file has no name; write one, such as alice-older")
        done = self.edited(name, strengths, keep)
        facts = {"subject": name, "base": self._base.name}
        facts |= {attribute: f"{strength:+g} sd" for attribute, strength in strengths.items() if strength}
        return export_point(done.point, folder / f"{stem}.safetensors", base=self._base, card=facts)

    def _knob(self, row: Direction, *, found: bool) -> Knob:
        low, high = useful_places(row, self.space)
        note = f"members lie between {low:+.1f} and {high:+.1f} sd"
        if found:
            note += f"; held-out figure of merit {row.auc:.2f}"
        return Knob(row.name, max(_REACH, float(round(max(-low, high) + 0.5))), (low, high), note)

    def _draw(self, z: tuple[float, ...], scene: Scene) -> Image.Image:
        model = self.model.with_adapter(self.space.point(torch.tensor(z)).adapter())
        if self.takes_prompts:
            asked = {"prompts": [scene.prompt], "guidance_scale": scene.guidance_scale}
        else:
            asked = {"labels": [scene.label]} if self.num_classes else {}
        clip = _CLIP if isinstance(model.codec, PixelCodec) else None
        drawn = generate(model, seeds=[scene.seed], steps=scene.steps, size=scene.size, clip_x0=clip, **asked)  # pyright: ignore[reportArgumentType]
        return _picture(drawn[0, 0])


def _components(space: WeightSpace) -> Directions:
    """Returns the leading components as directions."""
    rows = []
    for place in range(min(_COMPONENTS, space.num_components)):
        unit = torch.zeros(space.num_components, dtype=torch.float64)
        unit[place] = 1.0
        largest = float(space.members[:, place].max()) if len(space.members) else 1.0
        name = f"component {place + 1}"
        rows.append(Direction(name, unit, unit, unit, 1.0, largest, 1.0, float("nan"), (0, 0), "conditional"))
    return Directions(space.fingerprint, tuple(rows))


def _picture(image: Tensor) -> Image.Image:
    pixels = image.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
    found = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    factor = max(1, _SHOWN // max(found.size))
    return found.resize((found.width * factor, found.height * factor), Image.Resampling.NEAREST)


def _plain(text: str) -> str:
    """Returns text in which Markdown and HTML find nothing to obey."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", printable(text, 200))
