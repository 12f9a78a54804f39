"""The options that commands share, each described once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from diffcore.errors import UserError

ModelName = Annotated[str, Parameter(help="Pipeline folder, backbone folder, safetensors file, or zoo:NAME.")]
Features = Annotated[
    tuple[str, ...],
    Parameter(
        consume_multiple=True,
        negative="",
        help="Name of a preset (sd15/practical), a selection.json, or names of activations, abbreviations included.",
    ),
]
FilterName = Literal["measured", "paper", "none"]


@Parameter(name="*", group="Extraction", negative="")
@dataclass(frozen=True)
class Extraction:
    """How images enter the network.

    Attributes:
        t: Timestep of the noise in the units of the model's schedule, or snr:DB, or sigma:S (paper: 50).
        prompt: Prompt for all images; by default that of the selection, or the empty one.
        seed: Seed of the noise, which is the runtime's: `Work.seeded` sets it.
        draws: Number of noise draws that are averaged (DIFT: 8).
        size: Side of the square input in pixels; by default that which the model was trained for.
        mode: How an image of other proportions is fitted: stretched, with bars, cropped, or at its own proportions.
        protocol: "paper" repeats the published code: Pillow's resizing, drawn latents, the scheduler's own timestep.
        batch_size: Largest number of rows in a forward pass, by default 16 (score: 48); halved where memory runs out.
    """

    t: str | None = None
    prompt: str | None = None
    seed: Annotated[int, Parameter(parse=False)] = 0
    draws: int | None = None
    size: int | None = None
    mode: Literal["squash", "letterbox", "crop", "native"] = "squash"
    protocol: Literal["ours", "paper"] = "ours"
    batch_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("draws", "size", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"`{name}` is {value}; give at least 1")

    def rows(self, usual: int = 16) -> int:
        """Returns the largest number of rows in a forward pass.

        Args:
            usual: Number where the option is not given.
        """
        return self.batch_size or usual

    @property
    def timestep(self) -> float | str | None:
        """The timestep as a number where it is one."""
        if self.t is None:
            return None
        try:
            return float(self.t)
        except ValueError:
            return self.t


Images = Annotated[Path, Parameter(help="Folder or zip archive of images, or one image file.")]
