"""The groups of options that commands share, so that they mean the same in every script."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from diffcore.runtime import Runtime

if TYPE_CHECKING:
    from diffcore.models import DiffusionModel

Flag = Annotated[bool, Parameter(negative="")]
"""An option that is off unless it is given."""


@Parameter(name="*", group="Output", negative="")
@dataclass(frozen=True)
class Output:
    """Where results go and how a command runs; a group of command line options.

    Attributes:
        out: Run folder; the same command with the same folder goes on where it stopped.
        restart: Rename a run that is in the folder to NAME.old-N and start anew.
        dry_run: Print what would be done and written, and do nothing.
        json: Print the result as one JSON object.
        config: YAML file with options; the command line wins over it.
    """

    out: Path | None = None
    restart: bool = False
    dry_run: bool = False
    json: bool = False
    config: Path | None = None


@Parameter(name="*", negative="")
@dataclass(frozen=True)
class Timing:
    """How benchmark cases are run; the options of every command `bench`, named as `diffcore.bench.run_cases` has them.

    Attributes:
        smoke: Check on tiny sizes that both sides agree, without timing.
        json_path: File to write, with rows of name, value and unit.
        baseline: File that an earlier --json wrote.
        fail_below: Smallest acceptable share of the baseline's ratios, such as 0.8.
    """

    smoke: bool = False
    json_path: Annotated[Path | None, Parameter(name="--json")] = None
    baseline: Path | None = None
    fail_below: float | None = None


@Parameter(name="*", group="Model", negative="")
@dataclass(frozen=True)
class Loading:
    """How a model is found and read; a group of command line options, named as `diffcore.models.load` has them.

    Attributes:
        download: Fetch a repository owner/name; without this option nothing is downloaded.
        allow_pickle: Read weights that are pickles, or networks that are programs; only from authors you trust.
        prediction_type: Quantity that the network predicts, where the files do not say.
        tokenizer: Folder with CLIP's vocabulary, for single files.
        like: Pipeline folder of the same family, for single files: its configurations and tokenizers.
    """

    download: bool = False
    allow_pickle: bool = False
    prediction_type: Literal["epsilon", "sample", "v_prediction", "flow_prediction"] | None = None
    tokenizer: Path | None = None
    like: Path | None = None


@Parameter(name="*", group="Model", negative="")
@dataclass(frozen=True)
class LoadingAny(Loading):
    """How a model of any family is found and read: the options of `Loading`, and that of models with a T5.

    Attributes:
        text_encoder: Folder with a T5 and its vocabulary, for PixArt, SD3 and Flux folders that came without.
    """

    text_encoder: Path | None = None


def load_model(name: str, loading: Loading, runtime: Runtime) -> "DiffusionModel":
    """Loads the model that a command names, after the number of threads is set.

    Args:
        name: Pipeline folder, backbone folder, safetensors file, or zoo:NAME.
        loading: Options that say how it is found and read.
        runtime: Options that say where and how to compute.

    Raises:
        UserError: There is no such model, or it is damaged or unsafe.
    """
    from diffcore.models import load

    runtime.apply_threads()
    return load(name, runtime, **asdict(loading))
