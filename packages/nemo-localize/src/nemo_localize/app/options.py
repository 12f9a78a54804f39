"""The options that commands share: said once, so that they mean and explain the same everywhere."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from diffcore.errors import UserError
from nemo_localize.settings import Compat, Method

Files = Annotated[tuple[Path, ...], Parameter(consume_multiple=True, negative="")]

ModelName = Annotated[str, Parameter(help="Pipeline folder, safetensors file, or zoo:NAME.")]
UnchangedModel = Annotated[str, Parameter(help="Pipeline folder, safetensors file, or zoo:NAME. It is not changed.")]
AuditedCaptions = Annotated[Path, Parameter(help="What to audit.")]
CalibrationFile = Annotated[
    Path | None,
    Parameter(help="Run of calibrate, or its calibration.json; not needed with --compat reference on SD 1.4."),
]
Tau = Annotated[
    float | None, Parameter(help="Take this threshold instead of a calibration's; whether it fits is yours to know.")
]
Methods = Annotated[tuple[Method, ...], Parameter(consume_multiple=True, negative="")]
MostFrequent = Annotated[
    int | None,
    Parameter(
        help="Take this many neurons, those that the most captions have, instead of all neurons of all captions."
    ),
]
ScalingFactor = Annotated[float, Parameter(help="What neurons are multiplied with; 0 is off.")]
DrawCompat = Annotated[
    Compat,
    Parameter(
        help="reference reproduces the published code: one draw of noise for all pictures of a caption, from seed 2 if "
        "none is given, and each caption's own neurons, those of captions that were not localised included."
    ),
]
Repeat = Annotated[int, Parameter(help="Number of the draw, for the ways that draw at random.")]
Strict = Annotated[bool, Parameter(negative="", help="Stop at the first unusable line instead of leaving it out.")]
UnitSize = Annotated[int, Parameter(help="Captions that share batches; what an interruption costs at most.")]


@Parameter(name="*", group="Model", negative="")
@dataclass(frozen=True)
class Loading:
    """How the model is found and read, and how much of it is computed at once.

    Attributes:
        download: Fetch a repository owner/name; without this word the network is never touched.
        tokenizer: Folder with CLIP's vocabulary, for single files.
        like: Pipeline folder of the same family, for single files: its configurations and tokenizers.
        batch_size: Latents per forward pass; halved where memory runs out.
        up: Look at the up blocks too, which hardly matter in the paper (appendix C.8).
    """

    download: bool = False
    tokenizer: Path | None = None
    like: Path | None = None
    batch_size: int = 64
    up: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"--batch-size is {self.batch_size}; give at least 1")


@Parameter(name="*", group="Judges", negative="")
@dataclass(frozen=True)
class Judging:
    """What looks at pictures. Numbers of different judges do not compare; tables name theirs.

    Attributes:
        sscd: Weights of SSCD, the paper's copy detector: TorchScript (sscd_disc_mixup) or an ONNX file; else structural
            similarity.
        clip: Folder of a CLIP, for the fit of pictures and captions; else that is not measured.
        originals: Folder of training images; a column file_name of the captions says which is whose, else by order.
        allow_pickle: Read judges that are pickles or programs; only from authors you trust.
    """

    sscd: Path | None = None
    clip: Path | None = None
    originals: Path | None = None
    allow_pickle: bool = False
