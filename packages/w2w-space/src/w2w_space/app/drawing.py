"""What commands that draw share: the model with its options, judges of pictures, and sheets of pictures."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from diffcore.errors import UserError, printable
from diffcore.io import files
from diffcore.metrics.attribute_network import AttributeNetwork
from diffcore.metrics.features import FeatureExtractor, feature_extractor
from diffcore.models import DiffusionModel, load
from diffcore.models.backbones import condition_keys
from diffcore.report import image_grid
from diffcore.runtime import Runtime
from w2w_space.app.options import Drawing
from w2w_space.probe import ClassifierScorer, Scorer, TextScorer, classifier_values

_CLASSES = 10


def drawing_model(name: str, drawing: Drawing) -> tuple[DiffusionModel, dict[str, Any]]:
    """Returns the model that a command draws with, and the options of `render`.

    Args:
        name: Name on the command line.
        drawing: Options of the command line.

    Raises:
        UserError: There is no such model, or prompts or classes do not suit it.
    """
    runtime = Runtime(device=drawing.device)
    runtime.apply_threads()
    model = load(name, runtime)
    of_classes = "class_labels" in condition_keys(model.backbone).required
    if model.prompts is not None and not drawing.prompt:
        raise UserError(f"{printable(model.name)} takes prompts; give `prompt`, that of the members' training")
    if model.prompts is None and drawing.prompt:
        raise UserError(f"{printable(model.name)} takes no prompts; leave `prompt` out")
    if drawing.label and not of_classes:
        raise UserError(f"{printable(model.name)} takes no classes; leave `label` out")
    options: dict[str, Any] = {
        "seeds": range(drawing.num_seeds),
        "guidance_scale": drawing.guidance_scale or 1.0,  # at 0 the formula would leave the prompt out
        "steps": drawing.steps,
        "size": drawing.size,
        "batch_size": drawing.batch_size,
    }
    if drawing.prompt:
        options["prompts"] = list(drawing.prompt)
    if of_classes:
        options["labels"] = list(drawing.label) or list(range(min(_CLASSES, _count_of_classes(model))))
    return model, options


def scorer_named(name: str, asked: Sequence[str], device: str) -> Scorer:
    """Returns the judge that a command names.

    Args:
        name: zoo:NAME of a classifier, or the folder of a CLIP.
        asked: Attributes of the command line.
        device: Device of the command line.

    Raises:
        UserError: There is no such judge, or it does not know an attribute.
    """
    runtime = Runtime(device=device)  # pyright: ignore[reportArgumentType]
    if name.startswith("zoo:"):
        network = feature_extractor(name, runtime).network
        if not isinstance(network, AttributeNetwork):
            raise UserError(f"{printable(name)} reads no attributes; take zoo:portraits-oracle, or a CLIP's folder")
        return ClassifierScorer(network, classifier_values(network, asked))
    from diffcore.metrics.prompt_fit import clip_text

    folder = Path(name.removeprefix("clip:"))
    texts = texts_of(asked)
    extractor = feature_extractor(f"clip:{folder}", runtime)
    return TextScorer(extractor, clip_text(extractor, folder), texts)


def texts_of(asked: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Returns what words such as "hat=a person with a hat|a person without a hat" ask a text-image model.

    Args:
        asked: Words of the command line.

    Raises:
        UserError: There is no word, or one is not of this form.

    Example:
        >>> texts_of(["hat=with a hat|bareheaded"])
        {'hat': ('with a hat', 'bareheaded')}
    """
    found = dict[str, tuple[str, str]]()
    for word in asked:
        name, sign, texts = word.partition("=")
        with_, bar, without = texts.partition("|")
        if not (name and sign and bar and with_.strip() and without.strip()) or "|" in without:
            raise UserError(
                f"{printable(word)!r} asks for nothing; write hat=a person with a hat|a person without a hat"
            )
        if name in found:
            raise UserError(f"{printable(name)!r} is given twice; give two texts for each `attribute`")
        found[name] = with_.strip(), without.strip()
    if not found:
        raise UserError("a CLIP is asked in words; give `attribute` such as hat=a hat|no hat")
    return found


def features_named(name: str, device: str) -> FeatureExtractor:
    """Returns the network whose features tell subjects apart.

    Args:
        name: Name of a feature extractor on the command line.
        device: Device of the command line.
    """
    return feature_extractor(name, Runtime(device=device))  # pyright: ignore[reportArgumentType]


def mask_at(path: Path) -> Float[Tensor, "h w"]:
    """Returns the weights of a mask's places in [0, 1].

    Args:
        path: Picture whose white marks the places that count.

    Raises:
        UserError: The file is no picture.
    """
    with files.explained(path, reading=True):
        data = files.read(path)
    try:
        with Image.open(io.BytesIO(data)) as picture:
            return torch.from_numpy(np.asarray(picture.convert("L"), dtype=np.float32) / 255)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{printable(path, 300)} is no picture; give a PNG whose white marks the background") from error


def save_sheet(path: Path, pictures: Tensor, labels: Sequence[str]) -> Path:
    """Writes a sheet of pictures with one row per point, and returns its file.

    Args:
        path: File that ends in .png.
        pictures: Pictures by point, condition and seed, in [0, 1].
        labels: Label of each row.
    """
    rows = pictures.flatten(1, 2)
    shown = rows if rows.shape[2] in (1, 3) else rows[:, :, :1]
    figure = image_grid(shown.flatten(0, 1), columns=rows.shape[1], row_labels=labels)
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata={"Software": None})
    files.write_whole(path, data.getvalue())
    return path


def _count_of_classes(model: DiffusionModel) -> int:
    config: Mapping[str, Any] = model.backbone.config  # pyright: ignore
    return int(config.get("num_class_embeds") or config.get("num_embeds_ada_norm") or 1)
