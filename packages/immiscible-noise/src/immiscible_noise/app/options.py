"""Option groups of the commands, and the images that they name."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from diffcore.errors import UserError, printable
from diffcore.runtime import Runtime
from immiscible_noise.coupling import Coupling, Preset
from immiscible_noise.study.settings import EvaluationSettings, FineTuneSettings, Network, Objective, TrainSettings

if TYPE_CHECKING:
    from diffcore.data import ImageSet
    from diffcore.metrics import FeatureExtractor
    from diffcore.models import DiffusionModel
    from immiscible_noise.study.captions import Captioned

_LOG = logging.getLogger("diffcore.immiscible_noise")


def _as_typed(default: Sequence[object]) -> str:
    return " ".join(map(str, default))


_Several = Parameter(consume_multiple=True, negative="", show_default=_as_typed)
Presets = Annotated[tuple[Preset, ...], _Several]
Numbers = Annotated[tuple[int, ...], _Several]
Noise = Annotated[Coupling, Parameter(name="*", group="Noise", negative="")]
Evaluation = Annotated[EvaluationSettings, Parameter(name="*", group="Evaluation", consume_multiple=True, negative="")]


@Parameter(name="*", group="Data", negative="")
@dataclass(frozen=True)
class Data:
    """Which images, and how they are read.

    Attributes:
        size: Side in pixels; images are cropped to the centre square and resized. Needed where sizes differ.
        split: Folder inside the data to read, such as train.
        grey: Read the images as grey ones.
        strict: Stop at the first unreadable image instead of leaving it out.
    """

    size: int | None = None
    split: str | None = None
    grey: bool = False
    strict: bool = False

    def read(
        self, data: Path, *, at_least: int = 1, model: "DiffusionModel | None" = None
    ) -> "tuple[ImageSet, dict[str, str]]":
        """Returns the images, and their sha256 by name; says what was left out.

        Args:
            data: Folder or zip of images.
            at_least: Number of images that the command needs.
            model: Model that is fine-tuned, whose size and channels the images take unless others are asked for.

        Raises:
            UserError: The images are too few, not square, or cannot be read.
        """
        from diffcore.data import load_images

        size, channels = self.size, 1 if self.grey else 3
        if model is not None:
            from immiscible_noise.study.tuning_set import image_channels, image_side

            size, channels = size or image_side(model), 1 if image_channels(model) == 1 else channels
        images = load_images(data, size=size, split=self.split, channels=channels, strict=self.strict)
        for name, reason in images.skipped:
            _LOG.warning("left out %s: it %s", printable(name), printable(reason, 200))
        for note in images.notes:
            _LOG.info("%s", note)
        height, width = images.images.shape[-2:]
        if height != width:
            raise UserError(
                f"{printable(data)} has {width} x {height} images; make them square with --size {min(height, width)}"
            )
        if len(images) < at_least:
            raise UserError(
                f"{printable(data)} has {len(images)} readable image; this command needs at least {at_least}"
            )
        return images, {printable(data.name): images.sha256}


@Parameter(name="*", group="Training", negative="")
@dataclass(frozen=True)
class Training:
    """How a model is trained; what is not given has a default that depends on whether a model is fine-tuned.

    Attributes:
        steps: Number of optimizer steps; 10000 by default, 1000 with --model.
        batch_size: Number of images per step over all devices; 256 by default, 16 with --model. Noise is assigned among
            those of each device, and with --scope global or --window among those of all.
        learning_rate: Step size of Adam; 1e-3 by default. With --model it is AdamW's, 1e-5 by default and 1e-4 for a
            LoRA.
        warmup: Number of steps over which the learning rate rises; 0 by default.
        ema_decay: Upper bound of the moving average's decay; 0.999 by default.
        snapshots: Number of sets of weights that are kept, at steps that double up to the last; 4 by default.
        snapshots_per_doubling: Number of sets that are kept between a step and its double; 1 by default.
        gradient_clip: Largest norm of the gradient, where 0 clips nothing; 0 by default, 1 with --model.
        checkpoint_every: Number of steps between checkpoints to resume from; 500 by default.
        objective: flow: flow matching (velocity, uniform times), the default; ddpm: noise prediction, 1000 steps,
            linear betas; edm: Karras et al. 2022; consistency: consistency training as first published (uniform
            levels), whose models the paper accelerated; consistency-improved: log-normal levels, weighted (Song and
            Dhariwal 2023). Only without --model, which has its own.
        network: unet is diffusers' UNet2DModel; mlp is for tiny images; auto, the default, takes mlp up to 8x8, unet
            above. Only without --model.
        width: Number of channels in the U-Net's first level, or of units in the MLP's hidden layers; 64 by default.
            Only without --model.
        class_conditional: Train with the folder's labels as condition. Only without --model.
        normalisation: symmetric, the default, maps pixels to [-1, 1]; standard to mean 0 and variance 1 over the data
            set, where the effect of the assignment is largest. Only without --model.
    """

    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    warmup: int | None = None
    ema_decay: float | None = None
    snapshots: int | None = None
    snapshots_per_doubling: int | None = None
    gradient_clip: float | None = None
    checkpoint_every: int | None = None
    objective: Objective | None = None
    network: Network | None = None
    width: int | None = None
    class_conditional: bool | None = None
    normalisation: Literal["symmetric", "standard"] | None = None

    def __post_init__(self) -> None:
        self.new()  # refuses what is out of its range

    @property
    def given(self) -> dict[str, Any]:
        """What the user gave, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def new(self) -> TrainSettings:
        """Returns the settings of a training in pixel space."""
        return TrainSettings(**self.given)


@Parameter(name="*", group="Fine-tuning", negative="")
@dataclass(frozen=True)
class FineTuning:
    """What is fine-tuned, and with which captions.

    Attributes:
        model: Model to fine-tune: a folder of diffusers, such as a Stable Diffusion, a safetensors file, or zoo:NAME.
            Without it a new model is trained in pixel space.
        lora_rank: Rank of a LoRA that is trained in place of the whole network.
        lora_alpha: Strength of the LoRA in units of its rank; by default the rank.
        lora_targets: Ends of the names of the layers that the LoRA changes.
        weight_decay: Decoupled weight decay of AdamW.
        caption_dropout: Share of the visits in which an image comes without its caption, for classifier-free guidance.
        gradient_checkpointing: Keep few activations, and compute the others again: less memory, more time, the same
            weights.
    """

    model: str | None = None
    lora_rank: int | None = None
    lora_alpha: float | None = None
    lora_targets: Annotated[tuple[str, ...] | None, Parameter(consume_multiple=True)] = None
    weight_decay: float | None = None
    caption_dropout: float | None = None
    gradient_checkpointing: bool | None = None

    def __post_init__(self) -> None:
        if self.model is None and self._given:
            name = next(iter(self._given))
            raise ValueError(f"`{name}` is for fine-tuning; name the model that is fine-tuned with `model`")
        self.settings(Training())

    @property
    def _given(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None and name != "model"}

    def settings(self, training: Training) -> FineTuneSettings:
        """Returns the settings of a fine-tuning.

        Args:
            training: Settings of the training, none of which are for pixel space only.

        Raises:
            UserError: A setting is out of its range, or is for a new model only.
        """
        ours = {f.name for f in fields(FineTuneSettings)}
        if other := [name for name in training.given if name not in ours]:
            raise UserError(f"`{other[0]}` is for a new model; leave it out, as `model` has its own")
        own = {name: value for name, value in self._given.items() if name in ours}
        return FineTuneSettings(**training.given, **own)


@Parameter(name="*", group="Captions", negative="")
@dataclass(frozen=True)
class Captions:
    """The captions of the images, for fine-tuning a model that takes prompts.

    Attributes:
        captions: File of captions (.jsonl, .csv, .txt); by default metadata.jsonl, files beside the images, or the
            names of the class folders.
        prompt: Caption of all images, in which {class} stands for the name of the class folder.
    """

    captions: Path | None = None
    prompt: str | None = None

    @property
    def given(self) -> str | None:
        """The name of the first option that the user gave."""
        return next((name for name, value in vars(self).items() if value is not None), None)

    def read(self, data: Path, images: "ImageSet", model: "DiffusionModel", split: str | None) -> "Captioned":
        """Returns the images that have a caption, and the captions; no captions for a model that takes none.

        Args:
            data: Folder or zip that the images were read from.
            images: Images as they were read.
            model: Model that is fine-tuned.
            split: Folder inside the data that was read.

        Raises:
            UserError: There are no captions, or the images do not fit the model.
        """
        from immiscible_noise.study.captions import Captioned, read_captions
        from immiscible_noise.study.tuning_set import check_images, needs

        check_images(model, images)
        if needs(model) != "captions":
            if self.given:
                raise UserError(f"`{self.given}` is for models that take prompts; {printable(model.name)} takes none")
            return Captioned(images, (), "none")
        found = read_captions(data, images, table=self.captions, prompt=self.prompt, split=split)
        distinct = len(set(found.captions))
        _LOG.info("captions: %s, %d distinct for %d images", found.source, distinct, len(found.captions))
        return found


@Parameter(name="*", group="Evaluation", negative="")
@dataclass(frozen=True)
class Features:
    """The network whose features are compared.

    Attributes:
        features: Network that gives the features: inception:FILE, clip:FOLDER, dino:FOLDER, sscd:FILE, random:SEED or
            zoo:NAME. By default a small classifier that is trained on the images' labels, once.
        allow_pickle: Run a TorchScript file of features, which is code; only from authors you trust.
    """

    features: str | None = None
    allow_pickle: bool = False

    def load(self, runtime: Runtime) -> "FeatureExtractor | None":
        """Returns the network; None for the classifier.

        Args:
            runtime: Device to compute on.
        """
        if self.features is None:
            return None
        from diffcore.metrics import feature_extractor

        return feature_extractor(self.features, runtime, allow_pickle=self.allow_pickle)


def seen(images: "ImageSet") -> dict[str, Any]:
    """Returns what was read, for a plan."""
    shape = "x".join(map(str, images.images.shape[1:]))
    return {"images": len(images), "shape": shape, "classes": len(images.classes)}
