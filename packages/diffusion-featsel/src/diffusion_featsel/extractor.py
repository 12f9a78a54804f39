"""The extractor: a module that takes images and returns the chosen activations of a diffusion model as maps.

One forward pass of the network per image, noise draw and timestep, which ends at the last activation that is wanted.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from diffcore.batching import InBatches
from diffcore.errors import UserError, printable
from diffcore.models import DiffusionModel
from diffcore.models import from_pipeline as model_of_pipeline
from diffusion_featsel.activation import Activation
from diffusion_featsel.forward import activations_of, noised
from diffusion_featsel.inventory import Inventory, inventory
from diffusion_featsel.normalise import ChannelMeter, ChannelStatistics, Normalisation, normalise
from diffusion_featsel.prepare import Mode, Picture, Prepared
from diffusion_featsel.presets import PRESETS, preset
from diffusion_featsel.project import Projection
from diffusion_featsel.protocol import Conditions, Protocol, Timestep, drawn, image_size, posterior
from diffusion_featsel.selection import Selection

if TYPE_CHECKING:
    from diffusion_featsel.backbone_form import Backbone

Balance = Literal["rms", "none"]
"""Whether activations are divided by their root mean square before they are concatenated."""

Images = Float[Tensor, "b 3 h w"] | UInt8[Tensor, "b 3 h w"] | Sequence[Picture]


@dataclass(frozen=True, eq=False)
class Latents:
    """Images in the model's space, which any timestep, prompt, draw or selection can start from.

    Attributes:
        mean: Mode of the posterior of each image's x0.
        std: Standard deviation of the posterior.
        keys: One number per image, as `image_keys` makes them.
        size: Height and width of the images in pixels.
    """

    mean: Float[Tensor, "b *data"]
    std: Float[Tensor, "b *data"]
    keys: tuple[int, ...]
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, rows: slice) -> "Latents":
        """Returns the latents of some of the images."""
        return replace(self, mean=self.mean[rows], std=self.std[rows], keys=self.keys[rows])


class FeatureExtractor(nn.Module):
    """Takes images and returns activations of a diffusion model, as a dictionary of maps at their native sizes.

    The networks are submodules, so that `to` moves them. They stay in `eval()` when the extractor is put into training
    mode, unless it is differentiable.

    Args:
        model: The diffusion model to look into.
        features: A selection, the name of a preset such as "sd15/practical", or names of activations. Size, resizing
            and draws of a preset are taken unless others are given.
        t: Timestep or several, see `timesteps`; by default that of the selection, or the paper's. With several
            timesteps the maps are called "NAME@T".
        prompt: Prompt for all images; by default that of the selection, or the empty one.
        protocol: "ours", "paper" for that of the published code, or other settings.
        seed: Seed of the noise; an image's noise depends on this and its pixels alone.
        draws: Number of noise draws that are averaged; by default that of the selection, or 1.
        size: Side of square inputs in pixels, or height and width; by default the size that the model was trained for.
        mode: Rule by which an image of other proportions fills the input; see `prepare`.
        balance: Whether `maps` divides each activation by its root mean square over a data set.
        normalise: Rule by which the features of each activation are normalised; see `normalise`.
        statistics: Statistics of activations by name, as `calibrate` measures them.
        projections: Projections of activations by name, applied in the hook.
        extra: Further entries of the condition, such as class labels or residuals of a ControlNet.
        differentiable: Whether to keep the graph, so that gradients flow back to the weights and the images.
        batch_size: Number of images per forward pass of the network; by default all that come together.
        listed: The inventory of the model for the usual size and prompt, where it is at hand; it saves a second.

    Raises:
        NoMatchError: The network has no activation of a name; the message lists the nearest.
        NonFiniteError: When called, where an activation is infinite, as happens in float16, or NaN.
        UserError: An activation has no image places, or a setting does not fit the model.

    References:
        Meng et al. 2024, section 3.

    Example:
        >>> from diffcore.models import from_pipeline
        >>> from diffcore.testing import tiny
        >>> model = from_pipeline(tiny.pipeline("sd15"))
        >>> extractor = FeatureExtractor(model, ["up-level0-upsampler-out", "up-level1-repeat0-vit-block0-cross-q"])
        >>> images = torch.rand(3, 3, 20, 30, generator=torch.Generator().manual_seed(0))
        >>> {name: tuple(map.shape) for name, map in extractor(images).items()}
        {'up-level0-upsampler-out': (3, 64, 8, 8), 'up-level1-repeat0-vit-block0-cross-q': (3, 32, 8, 8)}
        >>> extractor.calibrate(images)
        >>> tuple(extractor.maps(images, size=16).shape)
        (3, 96, 16, 16)
        >>> extractor.cost < 0.9
        True
    """

    def __init__(
        self,
        model: DiffusionModel,
        features: Selection | str | Sequence[str],
        *,
        t: Timestep | Sequence[Timestep] | None = None,
        prompt: str | None = None,
        protocol: Literal["ours", "paper"] | Protocol = "ours",
        seed: int | None = None,
        draws: int | None = None,
        size: int | tuple[int, int] | None = None,
        mode: Mode | None = None,
        balance: Balance = "rms",
        normalise: Normalisation = "none",
        statistics: Mapping[str, ChannelStatistics] | None = None,
        projections: Mapping[str, Projection] | None = None,
        extra: Mapping[str, Tensor] | None = None,
        differentiable: bool = False,
        batch_size: int | None = None,
        listed: Inventory | None = None,
    ) -> None:
        super().__init__()
        chosen = _chosen(features)
        if chosen.model and chosen.model != model.fingerprint:
            warnings.warn(f"the selection was chosen on another model than {model.name}", stacklevel=2)
        start = protocol if isinstance(protocol, Protocol) else _protocol(chosen, published=protocol == "paper")
        stated = {"seed": seed, "size": size, "mode": mode, "draws": draws}
        self.protocol = replace(start, **{key: value for key, value in stated.items() if value is not None})
        settled = isinstance(features, Selection) or (isinstance(features, str) and features in PRESETS)
        asked = chosen.t if t is None and settled else t
        self.t = self.protocol.timesteps(model, asked)
        self.prompt = chosen.prompt if prompt is None else prompt
        self.balance: Balance = balance
        self.normalise: Normalisation = normalise
        self.statistics = dict(statistics or {})
        self.projections = dict(projections or {})
        self.differentiable = differentiable
        self.model = model
        self.networks = nn.ModuleList(_networks(model))
        self._conditions = Conditions(model, dict(extra or {}))
        self._in_batches = None if batch_size is None else InBatches(batch_size)
        self._num_text = None
        if model.prompts is not None:
            self._num_text = _text_tokens(self._conditions(self.prompt, size=self.usual_size))
        self._inventories: dict[tuple[tuple[int, int], int | None], Inventory] = {}
        if listed is not None:
            self._inventories[listed.size, self._num_text] = listed
        self._asked = chosen.names
        rows = self.activations()
        names = tuple(row.name for row in rows)
        self.selection = replace(chosen, names=names, t=self.t[0], prompt=self.prompt, draws=self.protocol.draws)
        if normalise == "adaln" and (other := [row.name for row in rows if row.kind != "norm-out"]):
            raise UserError(
                f"`normalise` is 'adaln', which takes tensors after adaptive layer norm, and {other[0]} is none; "
                "choose norm-out of the block that follows it, or normalise by 'drop-massive'"
            )

    @classmethod
    def from_pipeline(cls, pipe: Any, features: Selection | str | Sequence[str], **settings: Any) -> "FeatureExtractor":
        """Returns an extractor around the networks of a diffusers pipeline in memory; see `FeatureExtractor`.

        Fused LoRA weights and fine-tuned networks are taken as they are; nothing is copied.

        Args:
            pipe: A pipeline of a class that `diffcore.models.from_pipeline` knows.
            features: A selection, the name of a preset, or names of activations.
            **settings: Settings of the extractor.
        """
        return cls(model_of_pipeline(pipe), features, **settings)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the maps, in the order in which they are returned and concatenated."""
        if len(self.t) == 1:
            return self.selection.names
        return tuple(f"{name}@{t:g}" for t in self.t for name in self.selection.names)

    @property
    def usual_size(self) -> tuple[int, int]:
        """Height and width, in pixels, of the network's input; in the mode "native" those that it was trained for."""
        size = self.protocol.size
        if size is None or self.protocol.mode == "native":
            return image_size(self.model)
        return (size, size) if isinstance(size, int) else size

    @property
    def cost(self) -> float:
        """Share of the network's forward pass that is run, from 0 to 1; the autoencoder and text are apart."""
        return max(row.cost for row in self.activations())

    def activations(self, size: tuple[int, int] | None = None, num_text: int | None = None) -> list[Activation]:
        """Returns what is known of the chosen activations.

        Args:
            size: Height and width of the network's input in pixels; by default that of the protocol.
            num_text: Number of text tokens of the condition; by default that of the prompt.

        Raises:
            NoMatchError: The network has no activation of a name; the message lists the nearest.
            UserError: An activation has no image places.
        """
        factor = int(getattr(self.model.codec, "factor", 1))
        height, width = size or self.usual_size
        key = ((height // factor, width // factor), self._num_text if num_text is None else num_text)
        if key not in self._inventories:
            self._inventories[key] = inventory(self.model, size=key[0], num_text=key[1])
        rows = self._inventories[key].named(self._asked)
        for row in rows:
            if row.kind == "self-map":
                raise UserError(f"{row.name} has a map for every place, not channels; choose queries or keys")
            if row.grid is None:
                raise UserError(f"{row.name} is text, or one vector per image; choose an activation with image places")
        return list({row.name: row for row in rows}.values())

    def forward(
        self,
        images: Images,
        prompts: Sequence[str] | None = None,
        *,
        keys: Sequence[int] | None = None,
        extra: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Returns the chosen activations of images as maps (b, channels, rows, columns) at their native sizes.

        Args:
            images: Images in [0, 1] as one tensor, or a sequence of images of any size and kind.
            prompts: One prompt per image; by default the extractor's prompt for all.
            keys: One number per image that its noise depends on; by default made from its pixels.
            extra: Further entries of the condition, with one row for all images or one for each.

        Raises:
            UserError: Images, prompts and network do not go together.
        """
        prepared = self.protocol.prepare(self.model, images, keys=keys)
        return self.features(self.latents(prepared), prompts, extra=extra)

    def latents(self, prepared: Prepared) -> Latents:
        """Returns prepared images in the model's space; the costly part that a timestep or prompt does not change."""
        grad = self.differentiable and torch.is_grad_enabled()
        mean, std = posterior(self.model, prepared.images, in_batches=self._in_batches, grad=grad)
        return Latents(mean, std, prepared.keys, (prepared.images.shape[2], prepared.images.shape[3]))

    def features(
        self,
        latents: Latents,
        prompts: Sequence[str] | None = None,
        *,
        extra: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Returns the chosen activations of encoded images as maps; see `forward`.

        Args:
            latents: Images in the model's space.
            prompts: One prompt per image; by default the extractor's prompt for all.
            extra: Further entries of the condition, with one row for all images or one for each.
        """
        if prompts is not None and len(prompts) != len(latents):
            raise ValueError(f"there are {len(latents)} images and {len(prompts)} `prompts`; give one per image")
        condition = self._conditions(self.prompt if prompts is None else prompts, size=latents.size)
        condition |= {key: value.to(self.model.device) for key, value in (extra or {}).items()}
        for key, value in condition.items():
            if len(value) not in (1, len(latents)):
                raise ValueError(
                    f"{key} of `extra` has {len(value)} rows; give one, or {len(latents)} for these images"
                )
        text = condition.get("encoder_hidden_states")
        rows = self.activations(latents.size, None if text is None else text.shape[1])
        found: dict[str, Tensor] = {}
        in_batches = self._in_batches or InBatches(len(latents))
        for t in self.t:
            parts = list(
                in_batches(
                    range(len(latents)),
                    lambda places, t=t: self._pass(latents, places, condition, t, rows),
                )
            )
            for row in rows:
                key = row.name if len(self.t) == 1 else f"{row.name}@{t:g}"
                maps = [part[row.name] for part in parts]
                found[key] = self._normalised(key, torch.cat(maps) if len(maps) > 1 else maps[0])
        return found

    def maps(
        self,
        images: Images,
        size: int | tuple[int, int] | None = None,
        prompts: Sequence[str] | None = None,
        *,
        keys: Sequence[int] | None = None,
    ) -> Float[Tensor, "b c gh gw"]:
        """Returns the activations balanced, resized bilinearly to one size, and concatenated, in float32.

        Args:
            images: Images in [0, 1] as one tensor, or a sequence of images of any size and kind.
            size: Side of the maps, or rows and columns; by default those of the finest activation.
            prompts: One prompt per image; by default the extractor's prompt for all.
            keys: One number per image that its noise depends on; by default made from its pixels.

        Raises:
            UserError: The root mean square of an activation is not known; `calibrate` measures it.
        """
        return self.concatenated(self(images, prompts, keys=keys), size)

    def concatenated(
        self, features: Mapping[str, Float[Tensor, "b _ _ _"]], size: int | tuple[int, int] | None = None
    ) -> Float[Tensor, "b c gh gw"]:
        """Returns features balanced, resized and concatenated as `maps` does, where they are at hand already.

        Args:
            features: Maps by the names that the extractor gives them.
            size: Side of the maps, or rows and columns; by default those of the finest activation.
        """
        grids = [tuple(features[name].shape[2:]) for name in self.names]
        target = (size, size) if isinstance(size, int) else size or max(grids, key=lambda grid: grid[0] * grid[1])
        parts = []
        for name in self.names:
            part = features[name].float() * self._factor(name)
            if tuple(part.shape[2:]) != tuple(target):
                part = F.interpolate(part, target, mode="bilinear", align_corners=False)
            parts.append(part)
        return torch.cat(parts, dim=1)

    def calibrate(self, images: Images | Iterable[Any]) -> None:
        """Measures the statistics that balancing and normalising take, over all places of all images.

        Args:
            images: One batch of images as `forward` takes it, or any number of batches.

        Raises:
            ValueError: There is no image.
        """
        batches = [images] if isinstance(images, Tensor) or _is_batch(images) else images
        meters: dict[str, ChannelMeter] = {}
        how, self.normalise = self.normalise, "none"
        try:
            for batch in batches:
                with torch.no_grad():
                    found = self(batch)
                for name, maps in found.items():
                    meters.setdefault(name, ChannelMeter(maps.shape[1], maps.device)).add(maps)
        finally:
            self.normalise = how
        if not meters:
            raise ValueError("there is no image to calibrate with; give at least one")
        self.statistics = {name: meter.statistics for name, meter in meters.items()}
        rms = {name: statistics.rms for name, statistics in self.statistics.items()}
        self.selection = replace(self.selection, rms=rms)

    def channels(self, name: str) -> int:
        """Returns the number of channels of a map, after projecting and dropping massive channels.

        Args:
            name: Name of the map, one of `names`.
        """
        activation = name.partition("@")[0]
        statistics = self.statistics.get(name)
        if statistics is not None and self.normalise in ("drop-massive", "adaln"):
            return int(statistics.moderate.sum())
        if activation in self.projections:
            return self.projections[activation].basis.shape[1]
        return next(row.channels for row in self.activations() if row.name == activation)

    def only(self, names: Sequence[str]) -> "FeatureExtractor":
        """Returns an extractor of some of the activations, around the same networks and with the same settings.

        Args:
            names: Names of activations that this extractor has, in the order of the result.

        Raises:
            UserError: This extractor does not have one of them.
        """
        if foreign := [name for name in names if name not in self.selection.names]:
            raise UserError(f"this extractor has no {printable(foreign[0])}; it has {', '.join(self.selection.names)}")
        fewer = copy(self)
        fewer._modules = dict(self._modules)
        fewer._asked = tuple(dict.fromkeys(names))
        fewer.selection = replace(self.selection, names=fewer._asked)
        return fewer

    def as_backbone(self, out_indices: Sequence[int] | None = None) -> "Backbone":
        """Returns the extractor in timm's form: a list of maps, from fine to coarse, with their `feature_info`.

        Args:
            out_indices: Indices of the maps that are returned, negative ones from the end; by default all.
        """
        from diffusion_featsel.backbone_form import Backbone

        return Backbone(self, out_indices)

    def train(self, mode: bool = True) -> "FeatureExtractor":
        """Sets the mode of the extractor; its networks follow where it is differentiable alone."""
        super().train(mode)
        if not self.differentiable:
            self.networks.eval()
        return self

    def extra_repr(self) -> str:
        """Returns what is taken, and how much of the network is run for it."""
        names = ", ".join(self.selection.names)
        return f"{names}, t={', '.join(f'{t:g}' for t in self.t)}, {100 * self.cost:.0f} % of the network's operations"

    def _pass(
        self, latents: Latents, places: range, condition: Mapping[str, Tensor], t: float, rows: Sequence[Activation]
    ) -> dict[str, Tensor]:
        """Returns the mean over draws of each activation of some images; the draws are rows of one batch."""
        count, draws, whole = len(places), self.protocol.draws, len(latents)
        part = latents[places.start : places.stop]
        x_t = torch.cat([self._noised(part, t, draw) for draw in range(draws)])
        own = {
            key: value if len(value) == 1 or whole == 1 else value[places.start : places.stop]
            for key, value in condition.items()
        }
        own = {
            key: value.repeat(draws, *[1] * (value.ndim - 1)) if len(value) == count > 1 else value
            for key, value in own.items()
        }

        def kept(name: str, maps: Tensor) -> Tensor:
            if draws > 1:
                maps = maps.unflatten(0, (draws, count)).float().mean(0).to(maps.dtype)
            if name in self.projections:
                maps = self.projections[name](maps)
            return maps.contiguous()

        grad = self.differentiable and torch.is_grad_enabled()
        return activations_of(self.model, x_t, t, own, rows, reduce=kept, grad=grad)

    def _noised(self, part: Latents, t: float, draw: int) -> Tensor:
        protocol, x0 = self.protocol, part.mean
        if protocol.sample:
            x0 = drawn(part.mean, part.std, part.keys, seed=protocol.seed, draw=draw)
        x0 = x0.to(self.model.device)
        return noised(self.model, x0, part.keys, t, seed=protocol.seed, draw=draw)

    def _normalised(self, name: str, maps: Tensor) -> Tensor:
        return normalise(maps, self.normalise, self.statistics.get(name))

    def _factor(self, name: str) -> float:
        weight = self.selection.weights.get(name, self.selection.weights.get(name.partition("@")[0], 1.0))
        # Unit vectors and unit variances are balanced already.
        if self.balance == "none" or self.normalise not in ("none", "center"):
            return weight
        statistics = self.statistics.get(name)
        if statistics is not None and self.normalise == "center":
            rms = float(statistics.std.square().mean().sqrt())
        else:
            rms = self.selection.rms.get(name)
        if rms is None:
            raise UserError(
                f"`balance` is 'rms', and that of {printable(name)} is not known; call calibrate(images), or set it to "
                "'none'"
            )
        return weight / rms if rms > 0 else weight


def _chosen(features: Selection | str | Sequence[str]) -> Selection:
    if isinstance(features, Selection):
        return features
    if isinstance(features, str) and features in PRESETS:
        return preset(features).selection
    names = (features,) if isinstance(features, str) else tuple(features)
    if not names:
        raise UserError("`features` names no activation; give at least one")
    return Selection(names)


def _protocol(chosen: Selection, *, published: bool) -> Protocol:
    """Returns the protocol that a selection states in its details, ours or the published one otherwise."""
    details = chosen.details
    sample = published or bool(details.get("vae_sample"))
    side, fit = details.get("size"), details.get("fit", "squash")
    return Protocol(size=side, mode=fit, sample=sample, published=published, draws=chosen.draws)


def _text_tokens(condition: Mapping[str, Tensor]) -> int | None:
    states = condition.get("encoder_hidden_states")
    return None if states is None else states.shape[1]


def _networks(model: DiffusionModel) -> list[nn.Module]:
    every = [model.backbone, getattr(model.codec, "vae", None), *model.modules.values()]
    return list(dict.fromkeys(network for network in every if isinstance(network, nn.Module)))


def _is_batch(images: Any) -> bool:
    """Returns whether a sequence holds single images, not batches of them."""
    if not isinstance(images, Sequence) or not images or isinstance(images[0], list | tuple):
        return False
    return not isinstance(images[0], Tensor) or images[0].ndim == 3
