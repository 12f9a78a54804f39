"""A T5 text encoder from its own folder, for pipelines without one: PixArt and Flux need it, SD3 does not."""

from collections.abc import Mapping
from pathlib import Path

from diffcore.checkpoint.component import read_component
from diffcore.checkpoint.inventory import Component
from diffcore.checkpoint.refusal import refusal
from diffcore.checkpoint.walk import walk
from diffcore.errors import IncompatibleModelError, ModelNotFoundError, printable
from diffcore.io.strictjson import read_untrusted

_SLOTS = {"PixArtAlphaPipeline": "", "PixArtSigmaPipeline": "", "StableDiffusion3Pipeline": "_3", "FluxPipeline": "_2"}
_WIDTHS = ("caption_channels", "joint_attention_dim")  # of the states that a backbone takes
_FOLDERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def read_t5(
    folder: Path, pipeline_class: str | None, backbone: Component, *, allow_pickle: bool = False
) -> tuple[Component, Component]:
    """Returns a T5 and its tokenizer under the names that they have in a pipeline; neither is loaded.

    Args:
        folder: Holds `config.json`, weights and vocabulary; or is a pipeline folder with a T5 in it; or is the
            `text_encoder` folder of one, whose vocabulary lies beside it.
        pipeline_class: Class name of the pipeline that takes the encoder.
        backbone: The pipeline's backbone, which requires a width of the states.
        allow_pickle: Whether weights may be unpickled later on.

    Raises:
        ModelNotFoundError: There is no such folder.
        IncompatibleModelError: It holds no T5 with its vocabulary, one of another width, or the pipeline takes none.
    """
    if pipeline_class not in _SLOTS:
        raise IncompatibleModelError(
            f"{pipeline_class or backbone.class_name} takes no T5; leave out `text_encoder` {printable(folder, 300)}"
        )
    if not folder.is_dir():
        raise ModelNotFoundError(f"{printable(folder, 300)} is no folder; give the folder of a T5 with `text_encoder`")
    encoder_folder, vocabulary_folder = _places(folder, walk(folder))
    slot = _SLOTS[pipeline_class]
    encoder = _component(encoder_folder, f"text_encoder{slot}", "T5EncoderModel", allow_pickle=allow_pickle)
    width, wanted = (
        encoder.config.get("d_model"),
        next((backbone.config[k] for k in _WIDTHS if k in backbone.config), 0),
    )
    if width != wanted:
        raise refusal(encoder_folder, f"has states of width {width}, {backbone.class_name} takes {wanted}; give its T5")
    return encoder, _component(vocabulary_folder, f"tokenizer{slot}", "T5Tokenizer")


def _component(folder: Path, name: str, class_name: str, **options: bool) -> Component:
    return read_component(folder, walk(folder), name, "transformers", class_name, **options)


def _places(folder: Path, sizes: Mapping[str, int]) -> tuple[Path, Path]:
    """Returns the folder of the network and that of the vocabulary."""
    if "config.json" in sizes:
        if not sizes.keys() & {"tokenizer.json", "spiece.model"}:
            beside = folder.absolute().parent / folder.name.replace("text_encoder", "tokenizer")
            if beside.is_dir():
                return folder, beside
        return folder, folder
    for name in _FOLDERS:
        if f"{name}/config.json" in sizes and _is_t5(folder / name / "config.json"):
            return folder / name, folder / name.replace("text_encoder", "tokenizer")
    raise refusal(folder, "holds no T5; give a folder with its config.json, weights and vocabulary")


def _is_t5(path: Path) -> bool:
    return read_untrusted(path).get("model_type") == "t5"
