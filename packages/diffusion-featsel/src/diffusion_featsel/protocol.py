"""The protocol of an extraction: how images, timesteps, prompts and noise become the network's input.

Ours, and that of the published code (`Protocol.paper`), differ in four places. Theirs resizes by Pillow before colours
are converted, draws the latents from the autoencoder's posterior, takes the timestep that the pipeline's own scheduler
makes of the one asked for, and leaves seeds to chance. We seed their draws as our own, so that results repeat.

References:
    Meng et al. 2024, sections 3 and 5; the published code, `diffusion_feature.py`.
"""

import math
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from diffcore.batching import InBatches
from diffcore.denoiser import Condition, DiscreteSchedule, EDMSchedule, FlowSchedule
from diffcore.denoiser.library import spaced
from diffcore.errors import IncompatibleModelError, UserError, printable
from diffcore.models import DiffusionModel
from diffcore.models.backbones import condition_keys, latent_shape
from diffcore.models.prompts import joined
from diffcore.noise import mix_seed, row_noise
from diffusion_featsel.prepare import Mode, Picture, Prepared, prepare

Timestep = float | int | str
"""A timestep of the model's schedule, or "snr:DB", or "sigma:S"."""

_POSTERIOR = int.from_bytes(b"posterior"[:7])  # keeps draws of latents apart from draws of noise
_KEPT_PROMPTS = 64
_USUAL_SNR = 12.934  # decibel at t = 50 of Stable Diffusion's schedule


@dataclass(frozen=True)
class Protocol:
    """Settings of an extraction besides its timesteps and prompts.

    Attributes:
        size: Side of square inputs in pixels, or height and width; None is the size that the model was trained for.
        mode: Rule by which an image of other proportions fills the input; see `prepare`.
        sample: Whether latents are drawn from the autoencoder's posterior; otherwise they are its mode.
        published: Whether images are resized, and timesteps chosen, as in the published code.
        seed: Seed of the noise and of the drawn latents.
        draws: Number of noise draws whose activations are averaged.

    Example:
        >>> Protocol.paper(seed=3).sample, Protocol().mode
        (True, 'squash')
    """

    size: int | tuple[int, int] | None = None
    mode: Mode = "squash"
    sample: bool = False
    published: bool = False
    seed: int = 0
    draws: int = 1

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise UserError(f"`draws` is {self.draws}; give at least 1")

    @classmethod
    def paper(cls, **changes: Any) -> "Protocol":
        """Returns the protocol of the published code, with other settings changed."""
        return cls(**{"sample": True, "published": True, **changes})

    def prepare(
        self,
        model: DiffusionModel,
        images: Float[Tensor, "b 3 h w"] | UInt8[Tensor, "b 3 h w"] | Sequence[Picture],
        *,
        keys: Sequence[int] | None = None,
    ) -> Prepared:
        """Returns images as a model takes them; see `diffusion_featsel.prepare.prepare`."""
        size = image_size(model) if self.size is None and self.mode != "native" else self.size
        whole = multiple_of(model, self.mode)
        return prepare(images, size, mode=self.mode, multiple=whole, published=self.published, keys=keys)

    def timesteps(self, model: DiffusionModel, t: Timestep | Sequence[Timestep] | None = None) -> tuple[float, ...]:
        """Returns timesteps of a model's schedule; see `timesteps`."""
        found = timesteps(model, default_timestep(model) if t is None else t)
        return tuple(published_timestep(model, one) for one in found) if self.published else found

    def to_json(self) -> dict[str, Any]:
        """Returns the settings as plain values."""
        return vars(self) | {"size": list(self.size) if isinstance(self.size, tuple) else self.size}


def image_size(model: DiffusionModel) -> tuple[int, int]:
    """Returns height and width, in pixels, of the images that a model was trained for.

    Example:
        >>> from diffcore.testing import tiny
        >>> image_size(tiny.model("sd15"))
        (16, 16)
    """
    _, height, width = latent_shape(model.backbone)
    factor = int(getattr(model.codec, "factor", 1))
    return height * factor, width * factor


def multiple_of(model: DiffusionModel, mode: Mode = "squash") -> int:
    """Returns the number of pixels that sides of images must be a multiple of.

    This is the factor of the autoencoder times the side of a patch (transformers). For the mode "native" on a U-Net it
    is the factor times 2 for each halving of the resolution, so that every level divides the image evenly.

    Example:
        >>> from diffcore.testing import tiny
        >>> multiple_of(tiny.model("sd15")), multiple_of(tiny.model("sd15"), "native"), multiple_of(tiny.model("dit"))
        (2, 4, 4)
    """
    config: Any = model.backbone.config
    factor = int(getattr(model.codec, "factor", 1))
    if type(model.backbone).__name__ == "FluxTransformer2DModel":
        return 2 * factor
    if "block_out_channels" in config:
        return factor * 2 ** (len(config["block_out_channels"]) - 1) if mode == "native" else factor
    return factor * int(config.get("patch_size") or 1)


def default_timestep(model: DiffusionModel) -> float:
    """Returns the timestep of the paper, 50 of 1000; of other schedules the one with as much noise.

    Example:
        >>> from diffcore.testing import tiny
        >>> default_timestep(tiny.model("sd15")), round(default_timestep(tiny.model("sd3")), 3)
        (50.0, 0.184)
    """
    schedule = model.denoiser.schedule
    if isinstance(schedule, DiscreteSchedule) and schedule.num_timesteps == 1000:
        return 50.0
    return timesteps(model, f"snr:{_USUAL_SNR}")[0]


def timesteps(model: DiffusionModel, t: Timestep | Sequence[Timestep]) -> tuple[float, ...]:
    """Returns timesteps in the units of a model's schedule.

    Args:
        model: The diffusion model with its schedule.
        t: One timestep or several: a number in the units of the schedule, "snr:DB" for the signal-to-noise ratio
            alpha² / sigma² in decibel, or "sigma:S" for the factor sigma of the noise in x_t = alpha x0 + sigma noise.
            Schedules of whole timesteps answer with the nearest one.

    Raises:
        UserError: A timestep lies outside the schedule, is given twice, or is no number.

    Example:
        >>> from diffcore.testing import tiny
        >>> timesteps(tiny.model("sd15"), [0, 50, "snr:12.9", "sigma:0.22"])
        Traceback (most recent call last):
        diffcore.errors.UserError: `t` names the timestep 50 twice; name each once
        >>> timesteps(tiny.model("sd15"), [0, "snr:12.9", "sigma:0.31"])
        (0.0, 50.0, 92.0)
    """
    asked = [t] if isinstance(t, int | float | str) else list(t)
    if not asked:
        raise UserError("`t` names no timestep; give at least one")
    found = tuple(_timestep(model, one) for one in asked)
    if twice := [one for place, one in enumerate(found) if one in found[:place]]:
        raise UserError(f"`t` names the timestep {twice[0]:g} twice; name each once")
    return found


def _timestep(model: DiffusionModel, asked: Timestep) -> float:
    schedule = model.denoiser.schedule
    low, high = _ends(schedule)
    word, _, number = asked.partition(":") if isinstance(asked, str) else ("", "", "")
    try:
        value = float(number if word in ("snr", "sigma") else asked)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"`t` is {printable(asked)}; give a number, 'snr:DB' or 'sigma:S', such as 50 or snr:12.9")
    if word not in ("snr", "sigma"):
        if not low <= value <= high:
            usual = "" if isinstance(schedule, DiscreteSchedule) else f"; 'snr:{_USUAL_SNR}' is t=50 of 1000 elsewhere"
            raise UserError(f"`t` is {value:g}, but timesteps of {model.name} run from {low:g} to {high:g}{usual}")
        return value
    ends = torch.tensor([low, high], dtype=torch.float64)
    if word == "snr":
        least, most = sorted((schedule.log_snr(ends) * (10 / math.log(10))).tolist())
        chosen = schedule.timestep_at(torch.tensor(value * math.log(10) / 10, dtype=torch.float64))
        unit = " dB"
    else:
        least, most = schedule.alpha_sigma(ends)[1].tolist()
        chosen, unit = _at_sigma(schedule, value), ""
    if not least - 1e-9 <= value <= most + 1e-9:
        raise UserError(
            f"`t` is {printable(asked)}, but {word} of {model.name} runs from {least:.4g} to {most:.4g}{unit}"
        )
    return min(max(float(chosen), low), high)


def _ends(schedule: Any) -> tuple[float, float]:
    if isinstance(schedule, DiscreteSchedule):
        return 0.0, float(schedule.num_timesteps - 1)
    return (0.0, float(schedule.sigma_max)) if isinstance(schedule, EDMSchedule) else (0.0, 1.0)


def _at_sigma(schedule: Any, sigma: float) -> float:
    if isinstance(schedule, FlowSchedule | EDMSchedule):
        return sigma
    every = schedule.alpha_sigma(torch.arange(schedule.num_timesteps, dtype=torch.float64))[1]
    return float((every - sigma).abs().argmin())


def published_timestep(model: DiffusionModel, t: float | int) -> float:
    """Returns the timestep that the published code uses where one is asked for.

    It sets the scheduler of the pipeline to as many steps as there are timesteps, and starts as image-to-image does
    with strength t / 1000. Asked for 50, the usual scheduler of Stable Diffusion 1.5 (PNDM) gives 51, that of SDXL
    (Euler, leading) 50, and that of Stable Diffusion 2.1-base (Euler, linspace) 49.

    Args:
        model: The diffusion model, whose scheduler decides; without one, and for flow models, t stays.
        t: Timestep that is asked for.
    """
    schedule = model.denoiser.schedule
    if "scheduler" not in model.components or not isinstance(schedule, DiscreteSchedule):
        return t
    scheduler, total = model.components["scheduler"], schedule.num_timesteps
    times = spaced(scheduler.class_name, scheduler.config, total).timesteps
    left = min(max(round(t), 1), total)  # image-to-image with strength 0 has no step
    return float(min(max(float(times[total - left]), 0.0), total - 1.0))


@dataclass
class Conditions:
    """Conditions of prompts for one model, each prompt encoded once.

    Attributes:
        model: The diffusion model with its text encoders.
        extra: Further entries of the condition, for all images: class labels, or the residuals of a ControlNet.

    Example:
        >>> from diffcore.models import from_pipeline
        >>> from diffcore.testing import tiny
        >>> conditions = Conditions(from_pipeline(tiny.pipeline("sdxl")))
        >>> {key: tuple(value.shape) for key, value in conditions("a horse", size=(16, 16)).items()}
        {'encoder_hidden_states': (1, 77, 64), 'text_embeds': (1, 32), 'time_ids': (1, 6)}
    """

    model: DiffusionModel
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    _kept: OrderedDict[tuple[str, tuple[int, int]], dict[str, Tensor]] = field(default_factory=OrderedDict, repr=False)

    def __call__(self, prompts: str | Sequence[str], *, size: tuple[int, int]) -> dict[str, Tensor]:
        """Returns the condition of one prompt for all images, with one row, or of one prompt per image.

        No guidance takes place, so an empty prompt is encoded like any other.

        Args:
            prompts: One prompt for all images, or one for each.
            size: Height and width of the images in pixels; SDXL and PixArt are told of it.

        Raises:
            UserError: A prompt is given, and the model takes none or came without its text encoders.
        """
        asked = [prompts] if isinstance(prompts, str) else list(prompts)
        new = [key for key in dict.fromkeys((prompt, size) for prompt in asked) if key not in self._kept]
        if new:
            self._kept |= zip(new, self._encoded([prompt for prompt, _ in new], size), strict=True)
        rows = [self._kept[prompt, size] for prompt in asked]
        for prompt in asked:
            self._kept.move_to_end((prompt, size))
        while len(self._kept) > _KEPT_PROMPTS:
            self._kept.popitem(last=False)
        together = dict(joined(rows)) if len(rows) > 1 else rows[0]
        return {name: value.to(self.model.device) for name, value in (together | dict(self.extra)).items()}

    def _encoded(self, prompts: Sequence[str], size: tuple[int, int]) -> list[dict[str, Tensor]]:
        """Returns the condition of each prompt; CLIP reads long ones in pieces (published code)."""
        model = self.model
        if model.prompts is not None:
            if any(model.prompts.num_chunks(prompt) > 1 for prompt in prompts):
                return [dict(model.prompts.whole([prompt], size=size)) for prompt in prompts]
            tokens = model.prompts.tokenize(prompts)
            for prompt, lost in zip(prompts, tokens.lost, strict=True):
                if lost:
                    warnings.warn(
                        f"the text encoder does not see the end of {printable(prompt)!r}: {printable(lost)!r}",
                        stacklevel=4,
                    )
            return _each(model.prompts.encode(tokens, size=size), len(prompts))
        required = [key for key in condition_keys(model.backbone).required if key not in self.extra]
        if text := next((prompt for prompt in prompts if prompt), None):
            why = "came without text encoders" if required and required != ["class_labels"] else "takes no prompts"
            raise UserError(f"`prompt` is {printable(text)!r}, but {model.name} {why}; leave it empty")
        if required and required != ["class_labels"]:
            raise IncompatibleModelError(
                f"{model.name} takes {', '.join(required)} and came without text encoders; load its pipeline folder, "
                "or give these in `extra`"
            )
        return _each(model.empty_condition(len(prompts)) if required else {}, len(prompts))


def _each(condition: Condition, count: int) -> list[dict[str, Tensor]]:
    """Returns the rows of a condition."""
    return [{name: value[place : place + 1] for name, value in condition.items()} for place in range(count)]


def encode(
    model: DiffusionModel,
    images: Float[Tensor, "b 3 h w"],
    keys: Sequence[int] | None = None,
    *,
    sample: bool = False,
    seed: int = 0,
    draw: int = 0,
    in_batches: InBatches | None = None,
    grad: bool = False,
) -> Float[Tensor, "b *data"]:
    """Returns x0, which images in [0, 1] are encoded as: the mode of the posterior, or a draw from it.

    Args:
        model: The diffusion model, whose autoencoder encodes.
        images: Images of a size that the model takes, as `prepare` makes them.
        keys: One number per image, as `image_keys` makes them; needed for draws.
        sample: Whether to draw from the posterior, as the published code does.
        seed: Seed of the draws.
        draw: Number of the draw; each draw is independent.
        in_batches: Splits the images into batches that memory holds; by default all are encoded at once.
        grad: Whether to keep the graph, so that gradients flow back to the images.

    Raises:
        IncompatibleModelError: The model came without its autoencoder.
        ValueError: Draws are wanted without keys.

    Example:
        >>> from diffcore.testing import tiny
        >>> tuple(encode(tiny.model("sd15"), torch.rand(2, 3, 16, 16)).shape)
        (2, 4, 8, 8)
    """
    mean, std = posterior(model, images, in_batches=in_batches, grad=grad)
    if not sample:
        return mean
    if keys is None:
        raise ValueError("`sample` is on without `keys`; pass one key per image")
    return drawn(mean, std, keys, seed=seed, draw=draw)


def posterior(
    model: DiffusionModel,
    images: Float[Tensor, "b 3 h w"],
    *,
    in_batches: InBatches | None = None,
    grad: bool = False,
) -> tuple[Float[Tensor, "b *data"], Float[Tensor, "b *data"]]:
    """Returns mean and standard deviation of x0 for images in [0, 1], from which any number of draws is cheap.

    Args:
        model: The diffusion model, whose autoencoder encodes.
        images: Images of a size that the model takes.
        in_batches: Splits the images into batches that memory holds; by default all are encoded at once.
        grad: Whether to keep the graph, so that gradients flow back to the images.

    Raises:
        IncompatibleModelError: The model came without its autoencoder.
    """
    parts = list(
        (in_batches or InBatches(len(images)))(
            images, lambda rows: model.codec.posterior(rows.to(model.device), grad=grad)
        )
    )
    # In one layout: kernels choose by it, so that latents that were kept would differ in their features' last bits.
    mean, std = (torch.cat(rows).contiguous() for rows in zip(*parts, strict=True))
    return mean, std


def drawn(
    mean: Float[Tensor, "b *data"], std: Float[Tensor, "b *data"], keys: Sequence[int], *, seed: int = 0, draw: int = 0
) -> Float[Tensor, "b *data"]:
    """Returns a draw from the posterior of each image, which depends on the seed, its key and the number of the draw.

    Args:
        mean: Mean of each image's x0.
        std: Standard deviation of each image's x0.
        keys: One number per image, as `image_keys` makes them.
        seed: Seed of the draws.
        draw: Number of the draw; each draw is independent.
    """
    noise = row_noise(mix_seed(seed, stream=_POSTERIOR), keys, mean.shape[1:], stream=draw, device=mean.device)
    return mean + std * noise.to(mean.dtype)
