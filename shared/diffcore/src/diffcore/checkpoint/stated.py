"""Statements of a single-file checkpoint about its own parameterisation. Imports no torch.

Trainers and web UIs leave it in marker tensors (read by their presence: they are empty in most files), in the header,
or in a NAME.yaml beside the file.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from diffcore.checkpoint.families import PREFIX
from diffcore.checkpoint.inventory import Inventory
from diffcore.errors import IncompatibleModelError, printable
from diffcore.io.strictjson import StrictError, read_limited

CHANNELS = ("edm_mean", "edm_std")
"""Tensors with the mean and deviation of each latent channel, of networks with EDM preconditioning."""
MARKERS = ("v_pred", "ztsnr", *CHANNELS)
"""Tensors that say something and are no weights."""

_WORDS = {
    **dict.fromkeys(("epsilon", "eps", "noise", "EpsScaling"), "epsilon"),
    **dict.fromkeys(("v", "v_pred", "v-pred", "vpred", "velocity", "VScaling"), "v_prediction"),
    **dict.fromkeys(("sample", "x0"), "sample"),
}
_KNOWN = {*_WORDS.values(), "edm"}
_NOTHING = ("", "none", "null")
_ARCHITECTURES = {"stable-diffusion-v2-768-v": "v_prediction", "stable-diffusion-v2-512": "epsilon"}
_YAML = re.compile(
    r"^\s*parameterization:\s*[\"']?(?P<word>\w+)|^\s*target:.*\.denoiser_scaling\.(?P<scaling>\w+)", re.MULTILINE
)
_CLIP_SKIP = ("modelspec.encoder_layer", "ss_clip_skip")


@dataclass(frozen=True)
class Statement:
    """One statement of a file about its prediction type.

    Attributes:
        where: The place of the statement in words, such as "the tensor v_pred".
        prediction: Prediction type: epsilon, v_prediction, sample or edm; any other word as the file has it.
    """

    where: str
    prediction: str


@dataclass(frozen=True)
class Stated:
    """All statements of a file about its parameterisation.

    Attributes:
        path: The single file that was read.
        predictions: Statements about the prediction type, the most telling first.
        zero_snr: The place that says the last noise level is pure noise; None where nothing does.
        warnings: Statements of the file that are not followed.
    """

    path: Path
    predictions: tuple[Statement, ...]
    zero_snr: str | None
    warnings: tuple[str, ...]

    @property
    def prediction(self) -> Statement | None:
        """The statement that counts; None where the file says nothing.

        Raises:
            IncompatibleModelError: The file contradicts itself, or states an unsupported prediction type.
        """
        shown = printable(self.path, 300)
        for said in self.predictions:
            if said.prediction not in _KNOWN:
                raise IncompatibleModelError(
                    f"{shown} predicts {printable(said.prediction)!r} by {said.where}, which is not supported; "
                    "pass `prediction_type` if you know better"
                )
        if len({said.prediction for said in self.predictions}) > 1:
            told = " and ".join(f"{said.prediction} by {said.where}" for said in self.predictions)
            raise IncompatibleModelError(f"{shown} contradicts itself, it predicts {told}; pass `prediction_type`")
        return self.predictions[0] if self.predictions else None


def stated_by(path: Path, names: Collection[str], metadata: Mapping[str, str]) -> Stated:
    """Returns the statements of a single file about its parameterisation.

    Args:
        path: The single file; a NAME.yaml beside it is read too.
        names: Names of all its tensors.
        metadata: Metadata of its header; empty for pickles.

    Raises:
        IncompatibleModelError: The file states an unsupported parameterisation, or its NAME.yaml is malformed.
    """
    names = {name.removeprefix(PREFIX) for name in names}
    scaled = all(name in names for name in CHANNELS)
    strange = sorted(name for name in names if name.startswith("edm_") and not (scaled and name in CHANNELS))
    if strange:
        raise IncompatibleModelError(
            f"{printable(path, 300)} holds {', '.join(map(printable, strange[:3]))}: it has the velocity of EDM's "
            "preconditioning, as CosXL has, which is not supported; no setting makes it an ordinary SDXL"
        )
    predictions = [Statement("the tensors edm_mean and edm_std", "edm")] if scaled else []
    predictions += [Statement("the tensor v_pred", "v_prediction")] if "v_pred" in names else []
    predictions += [*_header_says(metadata), *_yaml_says(path.with_suffix(".yaml"))]
    if scaled:  # epsilon is also the word for what EDM's networks put out
        predictions = [said for said in predictions if said.prediction != "epsilon"]
    architecture = metadata.get("modelspec.architecture", "").split("/")[0]
    if not predictions and architecture in _ARCHITECTURES:
        predictions = [Statement(f"{_key('modelspec.architecture')}", _ARCHITECTURES[architecture])]
    zero_snr = "the tensor ztsnr" if "ztsnr" in names else None
    if zero_snr is None and metadata.get("ss_zero_terminal_snr", "").lower() == "true":
        zero_snr = _key("ss_zero_terminal_snr")
    return Stated(path, tuple(predictions), zero_snr, tuple(_not_followed(metadata)))


def require_agreement(inventory: Inventory, *, prediction_type: str | None = None) -> None:
    """Checks that the weights' own statements agree with the scheduler of their folder.

    Args:
        inventory: The checked content of a folder.
        prediction_type: Prediction type given by the user, which settles a contradiction.

    Raises:
        IncompatibleModelError: Weights and scheduler contradict each other.
    """
    parts = inventory.components.values()
    scheduler = next((component for component in parts if component.role == "scheduler"), None)
    config = scheduler.config if scheduler else {}
    usual = "edm" if scheduler and scheduler.class_name.startswith("EDM") else "epsilon"
    predicted = inventory.settings.get("prediction_type") or config.get("prediction_type", usual)
    headers = [header for component in parts if component.role == "backbone" for header in component.weights]
    for header in headers:
        stated = stated_by(header.path, header.tensors, header.metadata)
        said = None if prediction_type else stated.prediction
        if said is not None and said.prediction != predicted:
            raise IncompatibleModelError(
                f"{printable(header.path, 300)} predicts {said.prediction} by {said.where}, and its scheduler says "
                f"{printable(predicted)}; pass `prediction_type`"
            )
        if stated.zero_snr is not None and not config.get("rescale_betas_zero_snr"):
            raise IncompatibleModelError(
                f"{printable(header.path, 300)} ends in pure noise by {stated.zero_snr}, and its scheduler does not; "
                "set rescale_betas_zero_snr there"
            )


def _header_says(metadata: Mapping[str, str]) -> list[Statement]:
    said = []
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        word = re.sub(r"[-_ ]prediction$", "", metadata.get(key, "").strip().lower())
        if word not in _NOTHING:
            said.append(Statement(_key(key), _WORDS.get(word, word)))
    flag = metadata.get("ss_v_parameterization", "").strip().lower()
    if flag in ("true", "false"):
        said.append(Statement(_key("ss_v_parameterization"), "v_prediction" if flag == "true" else "epsilon"))
    return said


def _yaml_says(path: Path) -> list[Statement]:
    if not path.is_file():
        return []
    try:
        text = read_limited(path, 1_000_000).decode("utf-8", errors="replace")
    except StrictError as error:
        raise IncompatibleModelError(f"{printable(path, 300)} {error}; delete it") from None
    words = [match["word"] or match["scaling"] for match in _YAML.finditer(text)]
    return [Statement(printable(path.name), _WORDS.get(word, word)) for word in words]


def _not_followed(metadata: Mapping[str, str]) -> list[str]:
    told = []
    for key in _CLIP_SKIP:
        value = metadata.get(key, "").strip()
        if value.lower() not in (*_NOTHING, "0", "1"):
            told.append(f"the header's {key} is {printable(value)} (clip skip); the usual layer is taken")
    value = metadata.get("modelspec.timestep_range", "").strip()
    if value.lower() not in (*_NOTHING, "0,999", "0,1000"):
        told.append(f"the header's modelspec.timestep_range is {printable(value)}; the model is used at all timesteps")
    return told


def _key(name: str) -> str:
    return f"the header's {name}"
