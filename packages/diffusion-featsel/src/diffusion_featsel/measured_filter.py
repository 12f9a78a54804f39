"""The measured filter (section 3.2): which activations are dropped on any model, by numbers instead of by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from jaxtyping import Float
from torch import Tensor

from diffusion_featsel.activation import Activation


@dataclass(frozen=True)
class FilterSettings:
    """Thresholds of the measured filter.

    Attributes:
        min_reliability: Smallest share of content in content and noise.
        smallest_grid: Share of the image's side in cells at which a grid is too coarse (the paper: 8 cells at 512).
        max_similarity: CKA with an earlier kept activation above which one is a repetition.
        keep: Patterns of names that are never dropped, if they have places of an image.
    """

    min_reliability: float = 0.5
    smallest_grid: float = 1 / 64
    max_similarity: float = 0.995
    keep: tuple[str, ...] = ()


@dataclass(frozen=True)
class Filtered:
    """The activations that a filter keeps, and why it drops the others.

    Attributes:
        kept: Names of the kept activations, in order of execution.
        dropped: Reason with its number, by name.
    """

    kept: tuple[str, ...]
    dropped: Mapping[str, str] = field(default_factory=dict)


def measured_filter(
    activations: Sequence[Activation],
    reliability: Mapping[str, float | None],
    similarity: Float[Tensor, "a a"] | None,
    *,
    image_side: int,
    settings: FilterSettings | None = None,
) -> Filtered:
    """Drops activations that are mostly noise, too coarse, constant, without places, or repetitions.

    Args:
        activations: The activations in order of execution.
        reliability: Share of content in content and noise, by name; None for constant activations.
        similarity: CKA of each pair, in the order of the activations; None leaves repetitions in.
        image_side: Longer side of the images in pixels.
        settings: Thresholds; by default those of section 3.2.

    Example:
        >>> from diffcore.hooks import Site
        >>> noisy, clear = (Activation(n, Site(n), n, "up", channels=8, grid=(16, 16)) for n in ("a", "b"))
        >>> measured_filter([noisy, clear], {"a": 0.2, "b": 0.9}, None, image_side=128).dropped
        {'a': 'reliability 0.20 is below 0.5'}
    """
    settings = settings or FilterSettings()
    kept: list[int] = []
    dropped: dict[str, str] = {}
    for index, activation in enumerate(activations):
        name = activation.name
        reason = _reason(activation, reliability.get(name), image_side, settings)
        if reason is None and similarity is not None:
            # The similarity with a constant, kept on request, is NaN: it is no repetition of anything.
            alike = [(float(similarity[index, other].nan_to_num()), activations[other].name) for other in kept]
            most, twin = max(alike, default=(0.0, ""))
            if most > settings.max_similarity:
                reason = f"CKA {most:.4f} with {twin} is above {settings.max_similarity}"
        placeless = activation.grid is None
        if reason is None or (not placeless and any(fnmatchcase(name, pattern) for pattern in settings.keep)):
            kept.append(index)
        else:
            dropped[name] = reason
    return Filtered(tuple(activations[index].name for index in kept), dropped)


def _reason(activation: Activation, reliability: float | None, image_side: int, settings: FilterSettings) -> str | None:
    if activation.grid is None:
        return "it has no places of an image"
    if activation.kind.endswith("map"):  # "map" where attention is joint, "self-map" and "cross-map" elsewhere
        return "it is an attention map"
    if activation.same_as is not None:
        return f"it is the same tensor as {activation.same_as}"
    if reliability is None:
        return "it is constant"
    if max(activation.grid) <= image_side * settings.smallest_grid:
        height, width = activation.grid
        return f"its {height}x{width} grid is at most {image_side * settings.smallest_grid:g} cells"
    if reliability < settings.min_reliability:
        return f"reliability {reliability:.2f} is below {settings.min_reliability:g}"
    return None
