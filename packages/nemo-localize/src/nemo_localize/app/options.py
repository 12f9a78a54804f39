"""The options that commands share, each described once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from diffcore.errors import UserError
from nemo_localize.settings import (
    FIRST_IMAGE_SEED,
    PUBLISHED_IMAGE_SEED,
    Compat,
    ImageSettings,
    Mitigation,
    SearchSettings,
    StepSettings,
    guidance,
)

Files = Annotated[tuple[Path, ...], Parameter(consume_multiple=True, negative="")]
Step = Annotated[StepSettings, Parameter(name="*", group="Score", negative="")]
Search = Annotated[SearchSettings, Parameter(name="*", group="Search")]

ModelName = Annotated[str, Parameter(help="Pipeline folder, safetensors file, or zoo:NAME.")]
UnchangedModel = Annotated[str, Parameter(help="Pipeline folder, safetensors file, or zoo:NAME. It is not changed.")]
AuditedCaptions = Annotated[Path, Parameter(help="File of captions to look at (.txt, .csv, .jsonl).")]
CalibrationFile = Annotated[
    Path | None,
    Parameter(help="Run of calibrate, or its calibration.json; not needed with --compat published on SD 1.4."),
]
Tau = Annotated[
    float | None,
    Parameter(help="Threshold instead of a calibration's, such as 0.45; it must fit the model and these settings."),
]
Mitigations = Annotated[tuple[Mitigation, ...], Parameter(consume_multiple=True, negative="")]
MostFrequent = Annotated[
    int | None,
    Parameter(
        help="Take this many neurons, those that the most captions have, instead of all neurons of all captions."
    ),
]
ScalingFactor = Annotated[float, Parameter(help="Factor of the ablated neurons' outputs; 0 ablates.")]
ImageCompat = Annotated[
    Compat,
    Parameter(
        help="published reproduces the authors' code: one draw of noise for all images of a caption, from seed 2 "
        "if none is given, and each caption's own neurons, those of captions that were not localized included."
    ),
]
Repeat = Annotated[int, Parameter(help="Number of the random draw, for mitigations with a random part.")]
Strict = Annotated[bool, Parameter(negative="", help="Stop at the first unusable line instead of leaving it out.")]
UnitSize = Annotated[int, Parameter(help="Number of captions that share batches; an interruption loses one group.")]


@Parameter(name="*", group="Model", negative="")
@dataclass(frozen=True)
class Computing:
    """Which layers are looked at, and how much is computed at once.

    Attributes:
        batch_size: Number of latents per forward pass; halved where memory runs out.
        up: Look at the up blocks too, which hardly matter in the paper (appendix C.8).
    """

    batch_size: int = 64
    up: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"`batch_size` is {self.batch_size}; give at least 1")


@Parameter(name="*", group="Images", negative="")
@dataclass(frozen=True)
class ImageOptions:
    """How images are generated.

    Attributes:
        num_images: Number of images per caption (paper: 10).
        image_seed: Seed of the first image, 1001 if none is given; none of them may be a seed of localization.
        image_guidance: Strength of classifier-free guidance; 0 and 1 mean none (paper, appendix B.3: 7).
        image_steps: Number of DDIM steps (published code: 50).
    """

    num_images: int = 10
    image_seed: int | None = None
    image_guidance: float = 7.0
    image_steps: int = 50

    def __post_init__(self) -> None:
        for name in ("num_images", "image_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"`{name}` is {getattr(self, name)}; give at least 1")
        if self.image_seed is not None and self.image_seed < 0:
            raise UserError(f"`image_seed` is {self.image_seed}; give 0 or more")
        object.__setattr__(self, "image_guidance", guidance(self.image_guidance))

    def seeds(self, compat: Compat = "none") -> range:
        """Returns the seeds of the initial noise; the published code starts at another one."""
        usual = PUBLISHED_IMAGE_SEED if compat == "published" else FIRST_IMAGE_SEED
        first = usual if self.image_seed is None else self.image_seed
        return range(first, first + self.num_images)

    def settings(self, batch_size: int, compat: Compat = "none") -> ImageSettings:
        """Returns what the library calls these options."""
        return ImageSettings(self.image_guidance, self.image_steps, batch_size, compat)


@Parameter(name="*", group="Judges", negative="")
@dataclass(frozen=True)
class Judging:
    """The networks that compare images. Numbers of different networks do not compare; tables name theirs.

    Attributes:
        sscd: Weights of SSCD, the paper's copy detector: TorchScript (sscd_disc_mixup) or an ONNX file; without them
            structural similarity.
        clip: Folder of a CLIP, for the fit of images and captions; without it the fit is not measured.
        originals: Folder of training images, assigned to captions by a column file_name, or else by order.
    """

    sscd: Path | None = None
    clip: Path | None = None
    originals: Path | None = None
