"""How near a generator's images are to a set of reference images, and whether modes are being lost.

Precision says that what is drawn is good, recall that all is drawn. A generator that collapses keeps the first and
loses the second, and its Fréchet distance may fall meanwhile: collapse looks like progress.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffcore.batching import InBatches
from diffcore.denoiser import Condition, EDMSchedule
from diffcore.metrics.features import feature_extractor
from diffcore.metrics.frechet import frechet_distance_from_features
from diffcore.metrics.precision_recall import precision_recall
from diffcore.models import DiffusionModel, generate
from diffcore.noise import row_noise
from diffcore.runtime import Runtime

NEIGHBOURS = 5
LEAST = NEIGHBOURS + 1
"""Smallest number of images of each side that can be measured."""
_PIXELS = 3 * 32 * 32  # largest images that are compared number by number
_LOST = 0.05
Features = Callable[[Float[Tensor, "b c h w"]], Float[Tensor, "b d"]]


@dataclass(frozen=True)
class Scores:
    """How near images are to reference images.

    Attributes:
        distance: Fréchet distance in the features.
        precision: Share of the images near a reference image.
        recall: Share of the reference images near an image; it falls when modes are lost.
        coverage: Share of the reference images with an image among their neighbours.
    """

    distance: float
    precision: float
    recall: float
    coverage: float

    def to_json(self) -> dict[str, float]:
        """Returns the scores as plain values."""
        return asdict(self)


def measured(reference: Float[Tensor, "n d"], found: Float[Tensor, "m d"]) -> Scores:
    """Returns how near images are to reference images, with five neighbours.

    Args:
        reference: Features of the reference images.
        found: Features of the images.

    Example:
        >>> x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
        >>> measured(x, x).recall
        1.0
    """
    scores = precision_recall(reference, found, k=NEIGHBOURS, k_coverage=NEIGHBOURS)
    distance = float(frechet_distance_from_features(reference, found))
    return Scores(distance, float(scores.precision), float(scores.recall), float(scores.coverage))


def image_shape(model: DiffusionModel) -> tuple[Literal[1, 3], int, int]:
    """Returns channels, height and width of the images that a model draws.

    Args:
        model: Model whose codec turns samples into images.

    Example:
        >>> from diffcore.testing import tiny
        >>> image_shape(tiny.model("unet2d"))
        (3, 8, 8)
    """
    factor = int(getattr(model.codec, "factor", 1))
    return 1 if model.shape[0] == 1 else 3, model.shape[-2] * factor, model.shape[-1] * factor


def features_for(
    shape: Sequence[int], name: str | None, runtime: Runtime, *, allow_pickle: bool = False
) -> tuple[str, Features]:
    """Returns the name of features, and the function from images to them.

    Args:
        shape: Channels, height and width of the images.
        name: Name of an extractor of diffcore, or "pixels"; by default pixels of images up to 32 x 32, and random:0,
            fixed random weights, for larger ones.
        runtime: Device of the network.
        allow_pickle: Whether extractors in TorchScript, which is code, may be run.

    Raises:
        UserError: There is no such extractor, or it may not be run.

    Example:
        >>> features_for((3, 8, 8), None, Runtime(device="cpu"))[0]
        'pixels'
    """
    size = 1
    for side in shape:
        size *= side
    name = name or ("pixels" if size <= _PIXELS else "random:0")
    if name == "pixels":
        return name, lambda images: 2 * images.flatten(1).float() - 1
    extractor = feature_extractor(name, runtime, allow_pickle=allow_pickle)

    def features(images: Tensor) -> Tensor:
        coloured = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
        with torch.no_grad():
            parts = InBatches(32)(coloured, lambda part: extractor(part.to(runtime.torch_device)).cpu())
            return torch.cat(list(parts))

    return name, features


def drawn_images(
    model: DiffusionModel,
    generator: nn.Module,
    condition: Condition,
    count: int,
    *,
    seed: int,
    batch_size: int = 64,
) -> Float[Tensor, "n c h w"]:
    """Returns images of a one-step generator; image i has the i-th latent of the seed.

    Args:
        model: Model whose codec turns samples into images.
        generator: One-step generator: (z, condition) to x0.
        condition: Keyword tensors with `count` rows; empty for a model without conditions.
        count: Number of images that are drawn.
        seed: Seed of all latents.
        batch_size: Number of images in one call of the network.
    """
    options = {"generator": lambda z, cond: generator(z, cond or None)}
    return _images(model, condition, count, seed, batch_size, options)


def teacher_images(
    model: DiffusionModel,
    condition: Condition,
    count: int,
    *,
    seed: int,
    steps: int | None = None,
    guidance_scale: float = 1.0,
    uncond: Condition | None = None,
    batch_size: int = 64,
) -> Float[Tensor, "n c h w"]:
    """Returns images that the teacher draws in many steps, from the latents that `drawn_images` has.

    Args:
        model: The teacher, as it was loaded.
        condition: Keyword tensors with `count` rows; empty for a model without conditions.
        count: Number of images that are drawn.
        seed: Seed of all latents.
        steps: Number of solver steps; by default 18 of Heun's for EDM networks, 50 for others.
        guidance_scale: Strength of classifier-free guidance; 1 is off.
        uncond: Condition with one row that guidance leads away from.
        batch_size: Number of images in one call of the network.
    """
    edm = isinstance(model.denoiser.schedule, EDMSchedule)
    options = {"steps": steps or (18 if edm else 50), "solver": "heun" if edm else "ddim"}
    options |= {"guidance_scale": guidance_scale, "uncond": uncond}
    return _images(model, condition, count, seed, batch_size, options)


def _images(
    model: DiffusionModel, condition: Condition, count: int, seed: int, batch_size: int, options: Mapping[str, object]
) -> Tensor:
    z = row_noise(seed, range(count), model.shape)
    told = dict(options)
    if condition:  # one prompt or class, and one latent, for each row
        images = generate(
            model,
            seeds=[0],
            condition=condition,
            noise=z.unsqueeze(1),
            batch_size=batch_size,
            **told,  # pyright: ignore
        )
        return images.flatten(0, 1)
    images = generate(model, seeds=range(count), noise=z.unsqueeze(0), batch_size=batch_size, **told)  # pyright: ignore
    return images.flatten(0, 1)


def losing_modes(looks: Sequence[tuple[int, Scores]]) -> str | None:
    """Returns a warning where quality has risen since some earlier look while recall or coverage has fallen.

    Args:
        looks: Iterations with what was measured there, in their order.

    Example:
        >>> early, late = Scores(2.0, 0.8, 0.6, 0.9), Scores(1.0, 0.9, 0.4, 0.9)
        >>> losing_modes([(100, early), (200, late)])
        'from iteration 100 to 200 quality has risen while modes were lost: precision 0.80 to 0.90, recall 0.60 to 0.40'
    """
    if not looks:
        return None
    now, last = looks[-1]
    for name in ("recall", "coverage"):
        before, best = max(looks, key=lambda look: getattr(look[1], name))
        lost = getattr(best, name) - getattr(last, name) > _LOST
        better = last.precision > best.precision or last.distance < best.distance
        if lost and better:
            measure = "precision" if last.precision > best.precision else "distance"
            return (
                f"from iteration {before} to {now} quality has risen while modes were lost: "
                f"{measure} {getattr(best, measure):.2f} to {getattr(last, measure):.2f}, "
                f"{name} {getattr(best, name):.2f} to {getattr(last, name):.2f}"
            )
    return None
