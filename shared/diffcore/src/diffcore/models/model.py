"""The diffusion model that every technique works on, in one form for all file formats."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffcore.adapters import Adapter, Base, fuse, read_adapter
from diffcore.adapters.keys import BACKBONE
from diffcore.checkpoint.catalog import PIPELINES
from diffcore.checkpoint.inventory import Component
from diffcore.denoiser import DiscreteSchedule, NetworkDenoiser
from diffcore.denoiser.library import built, library_class
from diffcore.errors import IncompatibleModelError
from diffcore.hooks.offload import execution_device
from diffcore.models.assemble import make_codec, make_denoiser, make_prompts
from diffcore.models.backbones import condition_keys, latent_shape
from diffcore.models.bases import base_of
from diffcore.models.codec import Codec
from diffcore.models.prompts import PromptEncoder


@dataclass(frozen=True, eq=False)
class DiffusionModel:
    """A loaded diffusion model: frozen networks with their noise schedule, image codec and prompt encoder.

    Attributes:
        name: Name of the folder or file that it was loaded from.
        fingerprint: Digest of configurations, tensor headers and samples of the weights, used as cache key.
        denoiser: Backbone, schedule and prediction type.
        codec: Converts between images in [0, 1] and x0.
        prompts: Turns prompts into conditions; None where the model takes none, or came without its text encoders.
        pipeline_class: Class name of its diffusers pipeline; None for a bare backbone.
        components: Description of each part on disk.
        modules: Networks and tokenizers by their name in the pipeline.
        settings: Numbers and flags of the pipeline.
    """

    name: str
    fingerprint: str
    denoiser: NetworkDenoiser
    codec: Codec
    prompts: PromptEncoder | None
    pipeline_class: str | None
    components: Mapping[str, Component]
    modules: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def backbone(self) -> nn.Module:
        """The bare network."""
        return self.denoiser.backbone

    @property
    def backbone_name(self) -> str:
        """Name of the backbone in the pipeline: unet or transformer; "backbone" without a pipeline."""
        return next(name for name in self.modules if self.components[name].role == "backbone")

    @property
    def device(self) -> torch.device:
        """The device that the backbone computes on: that of its weights, unless accelerate offloads them."""
        return execution_device(self.backbone) or next(self.backbone.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the backbone's weights."""
        return next(self.backbone.parameters()).dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of x0, for the image size that the backbone was trained for."""
        return self.shape_at(None)

    def shape_at(self, size: int | None) -> tuple[int, int, int]:
        """Returns channels, height and width of x0 for images of another size.

        Args:
            size: Side of square images in pixels; None is the size that the backbone was trained for.
        """
        channels, height, width = latent_shape(self.backbone)
        if size is not None:
            height = width = max(size // getattr(self.codec, "factor", 1), 1)
        return channels, height, width

    def empty_condition(self, count: int) -> dict[str, Tensor]:
        """Returns the condition of the empty prompt, or of class 0.

        Args:
            count: Number of rows in each tensor.

        Raises:
            IncompatibleModelError: The model takes prompts and came without its text encoders.
        """
        if self.prompts is not None:
            return dict(self.prompts.unconditional(count))
        required = condition_keys(self.backbone).required
        if required == ("class_labels",):
            return {"class_labels": torch.zeros(count, dtype=torch.int64, device=self.device)}
        if required:
            raise IncompatibleModelError(
                f"{self.name} takes {', '.join(required)} and came without text encoders; point to its pipeline folder"
            )
        return {}

    def with_modules(self, change: str, modules: Mapping[str, nn.Module]) -> "DiffusionModel":
        """Returns the model with some of its networks replaced; the others are shared.

        Args:
            change: Description that tells this change from any other: it enters the fingerprint.
            modules: Replacements by their name in the pipeline.

        Raises:
            KeyError: The model has no network of a name.
        """
        for name in modules:
            if name not in self.modules:
                raise KeyError(f"{self.name} has no {name}; it has {', '.join(self.modules)}")
        merged = {**self.modules, **modules}
        backbone = merged[self.backbone_name]
        codec = make_codec(self.name, type(backbone).__name__, backbone, merged.get("vae"))
        return replace(
            self,
            fingerprint=hashlib.sha256(f"{self.fingerprint} {change}".encode()).hexdigest(),
            denoiser=make_denoiser(backbone, self.denoiser.prediction_type, self.denoiser.schedule),
            codec=codec,
            prompts=self.prompts and make_prompts(self.pipeline_class, merged, backbone, codec, self.settings),
            modules=merged,
        )

    @cached_property
    def adapter_base(self) -> Base:
        """Names and shapes of the weights that adapters can change."""
        return base_of(self.name, self.modules, self.backbone)

    def with_adapter(self, adapter: Path | str | Adapter, scale: float = 1.0) -> "DiffusionModel":
        """Returns the model with a LoRA fused into it; weights that it does not touch are shared.

        Args:
            adapter: A file or PEFT folder, or an adapter read from one.
            scale: Strength of the adapter: 1 is what it was trained for, 0 is off.

        Raises:
            UserError: The file is no LoRA, is damaged, or does not fit this model in every tensor.
            ValueError: `scale` is not finite, or an adapter made in memory does not fit.
        """
        if not isinstance(adapter, Adapter):
            adapter = read_adapter(adapter, self.adapter_base)
        if lost := [component for component in adapter.text_encoders if component not in self.modules]:
            raise ValueError(f"{self.name} has no {lost[0]}, which {adapter.name} changes")
        names = {component: component for component in adapter.text_encoders} | {BACKBONE: self.backbone_name}
        fused = {names[c]: fuse(self.modules[names[c]], changes, scale) for c, changes in adapter.components.items()}
        return self.with_modules(f"adapter {adapter.fingerprint} at {scale!r}", fused)

    def save(self, folder: Path | str) -> Path:
        """Writes the model in the layout of diffusers, which `load` and diffusers itself read, and returns its folder.

        A pipeline becomes a pipeline folder; a bare backbone becomes one folder with its scheduler beside the weights.
        The files appear under their name only when all of them are written. Paths of this machine are left out.

        Args:
            folder: Place of the new folder; nothing may be there yet.

        Raises:
            UserError: Something is there already, or the place is not writable.
            MachineError: The disk is full or failing.

        Example:
            >>> from diffcore.models import from_pipeline
            >>> from diffcore.testing import tiny
            >>> from tempfile import mkdtemp
            >>> folder = from_pipeline(tiny.pipeline("dit")).save(Path(mkdtemp()) / "dit")
            >>> sorted(path.name for path in folder.iterdir())
            ['model_index.json', 'scheduler', 'transformer', 'vae']
        """
        from diffcore.models.save import new_folder, write_backbone

        with new_folder(Path(folder)) as partial:
            if self.pipeline is not None:
                self.pipeline.save_pretrained(partial)
            else:
                write_backbone(self, partial)
        return Path(folder)

    @cached_property
    def pipeline(self) -> Any:
        """The pipeline of the diffusers library around the same modules; None for a bare backbone."""
        if self.pipeline_class is None:
            return None
        parts = {name: self.modules.get(name) for name in PIPELINES[self.pipeline_class]}
        parts["scheduler"] = self.scheduler
        settings: dict[str, Any] = {}
        if self.pipeline_class == "StableDiffusionPipeline":
            settings = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        if self.pipeline_class == "StableDiffusionXLPipeline":
            zeros = bool(self.settings.get("force_zeros_for_empty_prompt", True))
            settings = {"force_zeros_for_empty_prompt": zeros, "add_watermarker": False}
        return library_class(self.pipeline_class)(**parts, **settings)

    @property
    def scheduler(self) -> Any:
        """A new scheduler of the diffusers library with the model's prediction type; None where none came with it."""
        if "scheduler" not in self.components:
            return None
        scheduler = self.components["scheduler"]
        if isinstance(self.denoiser.schedule, DiscreteSchedule):  # the user may have said what is predicted
            config = {**scheduler.config, "prediction_type": self.denoiser.prediction_type}
            scheduler = replace(scheduler, config=config)
        return built(scheduler.class_name, scheduler.config)
