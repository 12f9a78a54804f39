"""The options that commands share, each described once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from diffcore.errors import UserError

BaseModel = Annotated[
    str | None,
    Parameter(help="Base model of the adapters: pipeline folder, safetensors file, or zoo:NAME; else a known family."),
]
Sources = Annotated[
    tuple[Path, ...],
    Parameter(negative="", help="LoRA files, folders in PEFT's layout, or folders that hold such."),
]
SpacePath = Annotated[Path, Parameter(help="Space: the run folder of build, or a space file.")]
Subject = Annotated[
    str, Parameter(help="What is taken: a member's name, a point file, an adapter (it is projected), or 'mean'.")
]
DirectionsPath = Annotated[Path, Parameter(help="Run folder of directions, or its directions.safetensors.")]
FormatName = Literal["diffusers", "kohya", "peft"]
PrecisionName = Literal["float32", "float16", "bfloat16"]
Overwrite = Annotated[bool, Parameter(negative="", help="Replace an adapter that exists already.")]
RenderModel = Annotated[
    str | None, Parameter(help="Draw pictures with this model: pipeline folder, safetensors file, or zoo:NAME.")
]
ScorerName = Annotated[
    str | None,
    Parameter(help="Judge of pictures: zoo:portraits-oracle, or the folder of a CLIP of transformers."),
]
AskedFor = Annotated[
    tuple[str, ...],
    Parameter(negative="", help="Attribute of a classifier, such as hat; for CLIP NAME=WITH|WITHOUT in words. Repeat."),
]


@Parameter(name="*", group="Reading adapters", negative="")
@dataclass(frozen=True)
class Reading:
    """How adapters are brought to one layout.

    Attributes:
        model: Base model of the adapters: pipeline folder, safetensors file, or zoo:NAME; else a known family.
        rank: Rank of all; by default the commonest one of their modules.
        modules: Take the modules that all adapters change, or those that any does (zeros where one does not).
        convolutions: Take changes of convolutions too.
        materialise: Turn LoHa, LoKr and whole differences into LoRAs of this rank.
        largest_loss: Relative loss by the rank above which an adapter is left out.
        strict: End with an error where an adapter would be left out.
    """

    model: str | None = None
    rank: int | None = None
    modules: Literal["intersection", "union"] = "intersection"
    convolutions: bool = False
    materialise: bool = False
    largest_loss: float = 0.5
    strict: bool = False

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise UserError(f"`rank` is {self.rank}; give at least 1")
        if not 0 <= self.largest_loss <= 1:
            raise UserError(f"`largest_loss` is {self.largest_loss}; give 0 to 1")


@Parameter(name="*", group="Drawing", negative="")
@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn; all points share prompts and noise.

    Attributes:
        prompt: Prompt that every point draws; repeat the option for several.
        label: Class that every point draws, for models of classes; by default the first ten.
        num_seeds: Number of pictures for each prompt or class.
        guidance_scale: Scale of classifier-free guidance; 0 and 1 are off.
        steps: Number of solver steps for each picture.
        size: Side of the pictures in pixels; by default what the model was trained for.
        batch_size: Number of pictures that are drawn together; halved where memory runs out.
        device: Device to draw on; auto takes an accelerator if there is one.
    """

    prompt: tuple[str, ...] = ()
    label: tuple[int, ...] = ()
    num_seeds: int = 4
    guidance_scale: float = 1.0
    steps: int = 30
    size: int | None = None
    batch_size: int = 64
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"

    def __post_init__(self) -> None:
        for name in ("num_seeds", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"`{name}` is {getattr(self, name)}; give at least 1")
