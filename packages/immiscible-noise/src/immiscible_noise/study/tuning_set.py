"""A set of images as a trained model sees it: latents and conditions, each encoded once and kept in a run folder."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional

from diffcore.batching import InBatches
from diffcore.data import ImageSet
from diffcore.digests import digest_of
from diffcore.errors import IncompatibleModelError, UserError, printable
from diffcore.models import DiffusionModel, condition_keys
from diffcore.models.codec import PixelCodec
from diffcore.models.prompts import joined
from diffcore.run import Run
from immiscible_noise.study.captions import mostly_shared

_LOG = logging.getLogger("diffcore.immiscible_noise")
_UNIT = 256  # images, or captions, that are encoded and kept together
_PIXELS = 2**22  # of the images that are encoded at once: sixteen of 512 x 512


@dataclass(frozen=True, eq=False)
class ConditionTable:
    """The distinct conditions of a set of images: what the network is told, each encoded once.

    Attributes:
        names: Captions, or names of classes, in the order of the rows.
        rows: Keyword tensors of the network, one row for each name and, where there is one, a last row that says
            nothing, for training without a caption and for guidance.
        vectors: Vector of each row in which like conditions lie near one another.
        empty: Number of the row that says nothing; None where the model has none.
    """

    names: tuple[str, ...]
    rows: Mapping[str, Tensor]
    vectors: Float[Tensor, "rows features"]
    empty: int | None

    def __getitem__(self, places: Int[Tensor, " b"]) -> dict[str, Tensor]:
        """Returns the keyword tensors of some rows."""
        return {name: tensor[places] for name, tensor in self.rows.items()}


@dataclass(frozen=True, eq=False)
class TuningSet:
    """Images as latents, with their conditions, and the model that they are for.

    Attributes:
        model: Model that encoded them.
        latents: Clean samples in the model's space; None where only the conditions are needed, to measure a model.
        places: Row of each image's condition in `table`; None for a model that takes no condition.
        table: Distinct conditions; None for a model that takes none.
        shape: Channels, height and width of the latents.
    """

    model: DiffusionModel
    latents: Float[Tensor, "n c h w"] | None
    places: Int[Tensor, " n"] | None
    table: ConditionTable | None
    shape: tuple[int, int, int]

    @classmethod
    def encode(
        cls,
        model: DiffusionModel,
        images: ImageSet,
        captions: Sequence[str] | None,
        run: Run,
        *,
        with_latents: bool = True,
    ) -> "TuningSet":
        """Encodes images and captions; what the run holds already is read.

        Args:
            model: Model whose codec and text encoders are used.
            images: Square images, whose labels are the conditions of a class-conditional model.
            captions: Caption of each image, for a model that takes prompts.
            run: Run folder that keeps latents and conditions.
            with_latents: Whether the images are encoded, or only the conditions.

        Raises:
            UserError: The model takes captions or classes, and there are none, or images of other channels.
        """
        check_images(model, images)
        side = images.images.shape[-1]
        table, places = _conditions(model, images, captions, run, side)
        latents = encode_images(model, images.images, run) if with_latents else None
        return cls(model, latents, places, table, model.shape_at(side))

    def __len__(self) -> int:
        return 0 if self.latents is None else len(self.latents)

    @property
    def shares_conditions(self) -> bool:
        """Whether at least half of the images have the condition of another image too."""
        return self.places is not None and mostly_shared(self.places.tolist())


def needs(model: DiffusionModel) -> str | None:
    """Returns what a model is told of each image: "captions", "classes", or None.

    Args:
        model: Model that is fine-tuned.

    Raises:
        IncompatibleModelError: It came without its text encoders.
    """
    if model.prompts is not None:
        return "captions"
    required = condition_keys(model.backbone).required
    if required == ("class_labels",):
        return "classes"
    if required:
        raise IncompatibleModelError(
            f"{printable(model.name)} takes {', '.join(required)} and came without text encoders; give its pipeline "
            "folder"
        )
    return None


def image_side(model: DiffusionModel) -> int:
    """Returns the side in pixels of the square images that a model was trained for.

    Args:
        model: Model that is fine-tuned.
    """
    return model.shape[-1] * getattr(model.codec, "factor", 1)


def image_channels(model: DiffusionModel) -> int:
    """Returns the number of channels of the images that a model makes: 3, or that of a pixel-space model.

    Args:
        model: Model that is fine-tuned.
    """
    return model.shape[0] if isinstance(model.codec, PixelCodec) else 3


def check_images(model: DiffusionModel, images: ImageSet) -> None:
    """Refuses images that a model cannot be fine-tuned on, before anything is computed.

    Args:
        model: Model that is fine-tuned.
        images: Square images of one size.

    Raises:
        UserError: Their channels or their side do not fit, or a class-conditional model lacks their classes.
    """
    channels, side = images.images.shape[1], images.images.shape[-1]
    factor = getattr(model.codec, "factor", 1)
    if channels != image_channels(model):
        raise UserError(f"{printable(model.name)} takes images of {image_channels(model)} channels, not {channels}")
    if side % factor:
        raise UserError(
            f"the images have {side} pixels a side, and {printable(model.name)} takes multiples of {factor}; give "
            f"`size` {max(side // factor, 1) * factor}"
        )
    if needs(model) == "classes":
        config: Any = model.backbone.config
        known = config.get("num_embeds_ada_norm") or config.get("num_class_embeds")
        if images.labels is None:
            raise UserError(f"{printable(model.name)} is told a class; put the images of each class into a folder")
        if known and len(images.classes) > known:
            raise UserError(f"{printable(model.name)} knows {known} classes, the images have {len(images.classes)}")


def encode_images(model: DiffusionModel, images: UInt8[Tensor, "n c h w"], run: Run) -> Float[Tensor, "n ..."]:
    """Returns the clean samples that images are to a model, encoded once and kept in a run.

    Args:
        model: Model whose codec is used: the mode of its posterior.
        images: 8-bit images, whose sides the codec can divide.
        run: Run folder that keeps the samples.
    """
    in_batches = InBatches(max(_PIXELS // (images.shape[-1] * images.shape[-2]), 1))
    device = model.device

    @torch.no_grad()
    def encoded(batch: Tensor) -> Tensor:
        return model.codec.encode(batch.to(device).float() / 255).cpu()

    found = []
    for unit in images.split(_UNIT):
        content = digest_of(repr((model.fingerprint, str(model.dtype), unit.shape)) + _content(unit))
        found.append(
            _kept(run, f"latents-{content}", lambda unit=unit: {"x0": torch.cat([*in_batches(unit, encoded)])})
        )
    latents = torch.cat([part["x0"] for part in found])
    _LOG.info("%d images are latents of %s", len(latents), "x".join(map(str, latents.shape[1:])))
    return latents


def _conditions(
    model: DiffusionModel, images: ImageSet, captions: Sequence[str] | None, run: Run, side: int
) -> tuple[ConditionTable | None, Tensor | None]:
    """Returns the distinct conditions, and the row of each image's."""
    kind = needs(model)
    if kind is None:
        return None, None
    if kind == "classes":
        assert images.labels is not None  # by check_images
        return _class_table(model, images.classes), images.labels
    if captions is None or len(captions) != len(images):
        raise UserError(f"{printable(model.name)} takes captions; give one for each of the {len(images)} images")
    names = tuple(dict.fromkeys(captions))
    place = {name: number for number, name in enumerate(names)}
    return _caption_table(model, names, run, side), torch.tensor([place[caption] for caption in captions])


def _class_table(model: DiffusionModel, names: tuple[str, ...]) -> ConditionTable:
    numbers, empty = torch.arange(len(names)), None
    if type(model.backbone).__name__ == "DiTTransformer2DModel":  # its last class is the one without a label
        config: Any = model.backbone.config
        numbers, empty = torch.cat([numbers, torch.tensor([int(config["num_embeds_ada_norm"])])]), len(names)
    return ConditionTable(names, {"class_labels": numbers}, torch.eye(len(numbers)), empty)


def _caption_table(model: DiffusionModel, names: tuple[str, ...], run: Run, side: int) -> ConditionTable:
    prompts = model.prompts
    assert prompts is not None  # by needs
    tokens = prompts.tokenize(names)
    if cut := [text for text in tokens.lost if text]:
        _LOG.warning(
            "%d of %d captions are too long for the text encoder; the first loses %r",
            len(cut),
            len(names),
            printable(cut[0]),
        )
    size, in_batches = (side, side), InBatches(64)

    def encoded(batch: Sequence[str]) -> dict[str, Tensor]:
        return {name: tensor.cpu() for name, tensor in prompts(batch, size=size).items()}

    def unit_of(unit: Sequence[str]) -> Mapping[str, Tensor]:
        content = digest_of(repr((model.fingerprint, str(model.dtype), size, unit)))
        return _kept(run, f"captions-{content}", lambda: joined([*in_batches(unit, encoded)]))

    parts = [unit_of(names[start : start + _UNIT]) for start in range(0, len(names), _UNIT)]
    parts.append({name: tensor.cpu() for name, tensor in prompts.unconditional(1, size=size).items()})
    rows = joined(parts)
    return ConditionTable(names, rows, caption_vectors(rows, len(names)), len(names))


def caption_vectors(rows: Mapping[str, Tensor], count: int) -> Float[Tensor, "rows features"]:
    """Returns a unit vector for each caption: its pooled state, else its mean state, less the mean over the captions.

    States of any two captions point almost the same way; what tells them apart is how they differ from the mean.

    Args:
        rows: Keyword tensors of the network, a row for each caption and for the empty one.
        count: Number of captions, over which the mean is taken.
    """
    pooled = next((rows[name] for name in ("text_embeds", "pooled_projections") if name in rows), None)
    vectors = (rows["encoder_hidden_states"].float().mean(1) if pooled is None else pooled).float()
    return functional.normalize(vectors - vectors[:count].mean(0), dim=1)


def _kept(run: Run, key: str, compute: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """Returns the tensors of a part, computed where the run does not hold them."""
    if run.has(key):
        return run.load(key).tensors
    # In the layout that a file gives them: sums over another layout would differ in their last bits.
    tensors = {name: tensor.contiguous() for name, tensor in compute().items()}
    if run.leading:
        run.save(key, tensors)
    return tensors


def _content(images: Tensor) -> str:
    return hashlib.sha256(images.contiguous().numpy().data).hexdigest()
