"""The options of train and invert."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

import diffcore.cli
from diffcore.cli import LoadingAny
from diffcore.errors import UserError

if TYPE_CHECKING:
    from w2w_space.draw import Drawing
    from w2w_space.instance import Instance
    from w2w_space.invert import InversionSettings
    from w2w_space.recipe import Recipe

ModelName = Annotated[str, Parameter(help="Base model: pipeline folder, safetensors file, or zoo:NAME.")]


@Parameter(name="*")
@dataclass(frozen=True)
class Work(diffcore.cli.Work):
    """The options of every command that computes with a model.

    Attributes:
        loading: Options that say how the model is read.
    """

    script = "w2w-space"
    loading: LoadingAny = field(default_factory=LoadingAny)


@Parameter(name="*", group="Recipe", negative="")
@dataclass(frozen=True)
class RecipeOptions:
    """How each member is trained; the defaults are the paper's. All members of a population share one recipe.

    Attributes:
        targets: Last parts of the names of the linear modules that are changed.
        rank: Rank of each change.
        alpha: Strength of the changes while training: they are alpha / rank B A.
        learning_rate: Largest step of Adam.
        steps: Number of steps for each member.
        batch_size: Number of noisy pictures of each member in a step.
        betas: Decay rates of Adam's two moments.
        weight_decay: Decoupled weight decay of AdamW.
        warmup: Number of steps in which the learning rate rises.
        floor: Share of the learning rate at which its cosine ends; 1 keeps it constant.
        clip: Largest norm of one member's gradient; 0 clips nothing.
        init: Start all members from the same A (paper), or each from its own, for experiments.
    """

    targets: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = ("to_q", "to_v")
    rank: int = 1
    alpha: float = 27.0
    learning_rate: float = 1e-4
    steps: int = 800
    batch_size: int = 1
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-2
    warmup: int = 0
    floor: float = 1.0
    clip: float = 1.0
    init: Literal["shared", "own"] = "shared"

    def recipe(self, seed: int) -> "Recipe":
        """Returns the recipe that the library takes.

        Args:
            seed: Seed of the command line.
        """
        from w2w_space.recipe import Recipe

        told = {name: getattr(self, name) for name in self.__dataclass_fields__}
        try:
            return Recipe(**told | {"clip": self.clip or None, "seed": seed})
        except ValueError as error:
            raise UserError(str(error)) from None


@Parameter(name="*", group="Prior preservation", negative="")
@dataclass(frozen=True)
class PriorOptions:
    """Pictures of the class, which each step sees beside those of the subject, so that members keep drawing it.

    Attributes:
        class_images: Folder of pictures of the class, such as 200 that the base model drew (paper).
        class_prompt: Prompt of the class, such as "a photo of a person".
        prior_weight: Weight of the loss on the pictures of the class.
    """

    class_images: Path | None = None
    class_prompt: str | None = None
    prior_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.class_prompt is not None and self.class_images is None:
            raise UserError("`class_prompt` is given without pictures of the class; give them with `class_images`")
        if not self.prior_weight >= 0:
            raise UserError(f"`prior_weight` is {self.prior_weight}; give at least 0")


@Parameter(name="*", group="Search", negative="")
@dataclass(frozen=True)
class SearchOptions:
    """How a point is searched for.

    Attributes:
        style: Use art for paintings and the like, which lie outside: fewer components and a stronger prior.
        num_components: Number of components that move; by default 0.15 times the number of members, for art 0.015.
        steps: Largest number of steps of Adam (paper: 400).
        batch_size: Number of pairs of timestep and noise in a step.
        learning_rate: Largest step of a coordinate, in standard deviations.
        prior: Weight of the prior, which draws towards the mean; by default 0.001, for art 0.01.
        max_std: Bound on each coordinate in standard deviations; 0 for no bound.
        max_length: Bound on the length of the coordinates, in units of sqrt(components); 0 for no bound.
        check_every: Number of steps between two measurements on the fixed pairs.
        patience: Number of steps after which a loss that has not fallen by 1 % ends the search.
        num_pairs: Number of fixed pairs of timestep and noise that the measurements use.
        start: Begin at the mean, or at the best of the mean and 32 members.
        restarts: Number of searches for each subject; all after the first begin at random points.
    """

    style: Literal["photo", "art"] = "photo"
    num_components: int | None = None
    steps: int = 400
    batch_size: int = 4
    learning_rate: float = 0.05
    prior: float | None = None
    max_std: float = 3.0
    max_length: float = 1.2
    check_every: int = 25
    patience: int = 100
    num_pairs: int = 16
    start: Literal["mean", "nearest"] = "mean"
    restarts: int = 1

    def settings(self, seed: int) -> "InversionSettings":
        """Returns the settings that the library takes.

        Args:
            seed: Seed of the command line.
        """
        from w2w_space.invert import ART, PHOTO

        told = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("style", "prior")}
        told |= {"max_std": self.max_std or None, "max_length": self.max_length or None, "seed": seed}
        told |= {} if self.prior is None else {"prior": self.prior}
        try:
            return replace(ART if self.style == "art" else PHOTO, **told)
        except ValueError as error:
            raise UserError(str(error)) from None


@Parameter(name="*", group="Pictures of the report", negative="")
@dataclass(frozen=True)
class DrawingOptions:
    """What the report shows of what adapters draw.

    Attributes:
        image_prompts: Prompts to draw; by default the prompt of the subject.
        image_labels: Classes to draw, of models that draw classes; by default those of the pictures.
        num_images: Number of pictures for each prompt, from seeds 0, 1 and so on; 0 draws none.
        image_steps: Number of DDIM steps for each picture.
        image_guidance: Strength of classifier-free guidance (paper: 2.5; for paintings 4).
    """

    image_prompts: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = ()
    image_labels: Annotated[tuple[int, ...], Parameter(consume_multiple=True)] = ()
    num_images: int = 4
    image_steps: int = 30
    image_guidance: float = 2.5

    def __post_init__(self) -> None:
        if self.num_images < 0 or self.image_steps < 1:
            raise UserError("`num_images` must be at least 0, and `image_steps` at least 1")

    def of(self, prompt: str | None, subjects: "Sequence[Instance]", size: int | None) -> "Drawing | None":
        """Returns what is drawn; None where nothing is.

        Args:
            prompt: Prompt of the subjects; None for models that take none.
            subjects: Subjects whose classes are drawn where no others are named.
            size: Side of the pictures in pixels.
        """
        from w2w_space.draw import Drawing

        if not self.num_images:
            return None
        seeds, prompts, labels = tuple(range(self.num_images)), self.image_prompts, self.image_labels
        known = [each.condition["class_labels"] for each in subjects if "class_labels" in each.condition]
        if prompt is not None:
            prompts, labels = prompts or (prompt,), ()
        elif not labels:
            labels = tuple(dict.fromkeys(label for row in known for label in row.tolist()))
            # Pictures of several classes are several pictures already.
            seeds = seeds if len(labels) == 1 else seeds[:1]
        return Drawing(() if prompt is None else prompts, labels, seeds, self.image_guidance, self.image_steps, size)
