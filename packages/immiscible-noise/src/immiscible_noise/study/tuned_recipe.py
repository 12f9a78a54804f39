"""The recipe of a fine-tuned model: which model it was, how it was trained on, and how images are drawn with it."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim import Optimizer

from diffcore.data import ImageSet
from diffcore.denoiser import Denoiser, GuidedDenoiser, NetworkDenoiser, sample
from diffcore.errors import UserError
from diffcore.noise import row_noise
from immiscible_noise.coupling import Coupling
from immiscible_noise.study.recipe import SAMPLING_STREAM, AnyRecipe, Recipe
from immiscible_noise.study.settings import FineTuneSettings
from immiscible_noise.study.tuning_set import TuningSet

if TYPE_CHECKING:
    from diffcore.train.lora import LoraDenoiser

Told = Literal["nothing", "block", "soft", "ignore"]
"""What the coupling is told of the conditions: nothing, their numbers (block, ignore), or their vectors (soft)."""


@dataclass(frozen=True)
class FineTuneRecipe:
    """All that is needed to build a fine-tuned model again around its weights.

    Attributes:
        coupling: How noise met images.
        settings: Length of the training, LoRA, learning rate.
        model: Name or place of the model that was fine-tuned, as it was given.
        fingerprint: Digest of that model.
        shape: Channels, height and width of one image.
        told: Which form of the conditions the coupling was told.
        seed: Number that fixes order, noise, and the initial weights of a LoRA.
        data: Model and conditions in memory, without which nothing can be drawn; see `with_data`.
    """

    coupling: Coupling
    settings: FineTuneSettings
    model: str
    fingerprint: str
    shape: tuple[int, int, int]
    told: Told
    seed: int
    data: TuningSet | None = field(default=None, compare=False, repr=False)

    @property
    def kept_part(self) -> str:
        """Name of the part of the denoiser whose weights are kept: of a LoRA its own weights alone."""
        return "" if self.settings.lora_rank else "backbone"

    @property
    def has_codec(self) -> bool:
        """Whether images are encoded before, and decoded after: always."""
        return True

    def with_data(self, data: TuningSet) -> "FineTuneRecipe":
        """Returns the recipe with its model and conditions in memory.

        Args:
            data: The model that was fine-tuned, and conditions to draw images with.

        Raises:
            UserError: It is another model than the one that was fine-tuned.
        """
        if data.model.fingerprint != self.fingerprint:
            raise UserError(
                f"{data.model.name} is another model than the one that was fine-tuned; name the right one with `base`"
            )
        return replace(self, data=data)

    def fields(self) -> dict[str, Any]:
        """Returns the recipe as plain values, without what is in memory only."""
        return asdict(replace(self, data=None))

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "FineTuneRecipe":
        """Reads what `fields` returned."""
        settings = {**fields["settings"], "lora_targets": tuple(fields["settings"]["lora_targets"])}
        return cls(
            coupling=Coupling(**fields["coupling"]),
            settings=FineTuneSettings(**settings),
            model=fields["model"],
            fingerprint=fields["fingerprint"],
            shape=tuple(fields["shape"]),
            told=fields["told"],
            seed=fields["seed"],
        )

    def denoiser(self) -> Denoiser:
        """Returns the model's denoiser, copied in float32, or a new LoRA on its own weights."""
        if self.settings.lora_rank:
            denoiser = self.lora()
            backbone: Any = denoiser.network.backbone
        else:
            denoiser = copy.deepcopy(self._data.model.denoiser).float().requires_grad_(True)
            backbone = denoiser.backbone
        if self.settings.gradient_checkpointing:
            backbone.enable_gradient_checkpointing()
        return denoiser

    def lora(self, weights: Mapping[str, Tensor] | None = None) -> "LoraDenoiser":
        """Returns the LoRA on the model's own weights.

        Args:
            weights: Weights that were kept; without them those that training starts from.
        """
        from diffcore.train.lora import LoraDenoiser

        told = self.settings
        lora = LoraDenoiser(
            self._data.model.denoiser,
            told.lora_rank,
            alpha=told.lora_alpha,
            targets=told.lora_targets,
            seed=self.seed % 2**63,
        )
        if weights is not None:
            lora.load_state_dict(dict(weights))
        return lora

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """Returns AdamW over the parameters that learn."""
        learning = [parameter for parameter in parameters if parameter.requires_grad]
        return torch.optim.AdamW(learning, self.settings.peak, weight_decay=self.settings.weight_decay)

    def restored(self, weights: Mapping[str, Tensor]) -> NetworkDenoiser:
        """Returns the denoiser with weights that were kept; a LoRA's are added to the model's."""
        if self.settings.lora_rank:
            return self.lora(weights).merged()
        denoiser = copy.deepcopy(self._data.model.denoiser).float()
        denoiser.backbone.load_state_dict(dict(weights))
        return denoiser

    def conditions_of(self, images: ImageSet) -> Int[Tensor, " n"] | None:
        """Returns the row of each image's condition; `images` are those that the conditions were read for."""
        return self._data.places

    def some_conditions(self, count: int) -> Int[Tensor, " count"] | None:
        """Returns the conditions of the first images, again from the start where there are fewer."""
        places = self._data.places
        return None if places is None else places[torch.arange(count) % len(places)]

    @torch.no_grad()
    def generate(
        self,
        denoiser: Denoiser,
        rows: Int[Tensor, " b"],
        conditions: Int[Tensor, " b"] | None,
        *,
        steps: int,
        eta: float = 0.0,
        guidance: float = 1.0,
        seed: int = 0,
        stream: int = SAMPLING_STREAM,
    ) -> Float[Tensor, "b c h w"]:
        """Returns an image per row by DDIM steps, from the row's own noise, whatever else is in the batch.

        Args:
            denoiser: Trained denoiser, around whose weights the recipe was kept.
            rows: Numbers that choose the noises.
            conditions: Row of a condition in the table for each image; None for a model that takes none.
            steps: Number of solver steps.
            eta: Share of fresh noise in each solver step.
            guidance: Strength of classifier-free guidance; 0 and 1 are off.
            seed: Seed of all noises.
            stream: Number that keeps these noises apart from others of the seed.

        Raises:
            UserError: Guidance is asked for, and the model knows no empty condition.
        """
        data, device = self._data, next(denoiser.parameters()).device
        noise = row_noise(seed, rows, data.shape, stream=stream, device=device)
        cond: dict[str, Tensor] = {}
        if conditions is not None and data.table is not None:
            cond = {name: tensor.to(device) for name, tensor in data.table[conditions.cpu()].items()}
        if guidance not in (0, 1):
            if data.table is None or data.table.empty is None:
                raise UserError(f"`guidance` is {guidance:g}, but this model knows no empty condition; leave it out")
            empty = data.table[torch.tensor([data.table.empty])]
            denoiser = GuidedDenoiser(denoiser, guidance, {name: tensor.to(device) for name, tensor in empty.items()})
        x0 = sample(denoiser, noise, cond, steps=steps, eta=eta, seeds=rows.to(device))
        return data.model.codec.decode(x0)

    @property
    def _data(self) -> TuningSet:
        if self.data is None:
            raise ValueError("this recipe has no model in memory; give it one with `with_data`")
        return self.data


def told_of(coupling: Coupling, data: TuningSet) -> Told:
    """Returns what a coupling is told of the conditions of a set of images.

    Captions that are shared by at least half of the images are labels, inside which noise is exchanged; where captions
    hardly ever are equal, noise prefers images whose captions are alike.

    Args:
        coupling: How noise meets images.
        data: Images and conditions of the training.

    Raises:
        UserError: The coupling heeds conditions, and the model takes none; or it would compare captions over several
            processes.
    """
    if data.places is None:
        if coupling.condition != "auto":
            raise UserError(
                f"`condition` is {coupling.condition}, but {data.model.name} is told nothing of images; leave it out"
            )
        return "nothing"
    if coupling.condition != "auto":
        return coupling.condition
    if data.shares_conditions:
        return "block"
    if coupling.scope == "global":
        raise UserError(
            "`scope` is global, and hardly any two images have the same caption; give `condition` ignore, or `window`, "
            "which compares captions over all processes"
        )
    return "soft"


def recipe_of(fields: Mapping[str, Any]) -> AnyRecipe:
    """Reads a recipe of either kind from the plain values that `fields` returned.

    Args:
        fields: Plain values, as a run folder keeps them.
    """
    return FineTuneRecipe.from_fields(fields) if "fingerprint" in fields else Recipe.from_fields(fields)
