"""The options that commands share: said once, so that they mean and explain the same everywhere."""

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
    float | None, Parameter(help="Take this threshold instead of a calibration's; whether it fits is yours to know.")
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
        help="published does what the authors' code does: one draw of noise for all images of a caption, from seed 2 "
        "if none is given, and each caption's own neurons, those of captions that were not localized included."
    ),
]
Repeat = Annotated[int, Parameter(help="Number of the draw, for the mitigations that draw at random.")]
Strict = Annotated[bool, Parameter(negative="", help="Stop at the first unusable line instead of leaving it out.")]
UnitSize = Annotated[int, Parameter(help="Number of captions that share batches; what an interruption costs at most.")]


@Parameter(name="*", group="Model", negative="")
@dataclass(frozen=True)
class Loading:
    """How the model is found and read, and how much of it is computed at once.

    Attributes:
        download: Fetch a repository owner/name; without this word the network is never touched.
        tokenizer: Folder with CLIP's vocabulary, for single files.
        like: Pipeline folder of the same family, for single files: its configurations and tokenizers.
        batch_size: Number of latents per forward pass; halved where memory runs out.
        up: Look at the up blocks too, which hardly matter in the paper (appendix C.8).
    """

    download: bool = False
    tokenizer: Path | None = None
    like: Path | None = None
    batch_size: int = 64
    up: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"`batch_size` is {self.batch_size}; give at least 1")


@Parameter(name="*", group="Images", negative="")
@dataclass(frozen=True)
class ImageOptions:
    """How images are generated, which have the last word.

    Attributes:
        num_images: Number of images per caption (paper: 10).
        image_seed: Seed of the first one, 1001 if none is given; none of them may be a seed of localization.
        image_guidance: Classifier-free guidance; 0 and 1 are off (paper, appendix B.3: 7).
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
    """The networks that look at images. Numbers of different judges do not compare; tables name theirs.

    Attributes:
        sscd: Weights of SSCD, the paper's copy detector: TorchScript (sscd_disc_mixup) or an ONNX file; else structural
            similarity.
        clip: Folder of a CLIP, for the fit of images and captions; else that is not measured.
        originals: Folder of training images; a column file_name of the captions says which is whose, else by order.
        allow_pickle: Read judges that are pickles or programs; only from authors you trust.
    """

    sscd: Path | None = None
    clip: Path | None = None
    originals: Path | None = None
    allow_pickle: bool = False
