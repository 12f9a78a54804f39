"""True correspondences of all activations at once: key points are matched in the hooks, and no map is stored."""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from diffcore.batching import InBatches
from diffcore.models import DiffusionModel
from diffusion_featsel.activation import Activation
from diffusion_featsel.forward import Condition, activations_of, noised
from diffusion_featsel.match import MatchSettings, match_points
from diffusion_featsel.pairs import Pair
from diffusion_featsel.prepare import image_keys


def find_points(
    model: DiffusionModel,
    images: Mapping[str, Float[Tensor, "3 h w"]],
    pairs: Sequence[Pair],
    activations: Sequence[Activation],
    *,
    t: float = 50.0,
    condition: Condition | None = None,
    seed: int = 0,
    settings: MatchSettings | None = None,
    centered: bool = True,
    encode: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 48,
) -> dict[str, list[Float[Tensor, "points 2"]]]:
    """Finds the key points of each pair's source image in its target image, with each activation alone.

    Args:
        model: The diffusion model.
        images: Images in [0, 1] by the names that pairs have for them, all of the size that activations were listed for.
        pairs: Pairs of images with key points in pixels of these images.
        activations: What to match with.
        t: Timestep of the noise, in the units of the model's schedule.
        condition: Condition of the backbone, one row for all images; by default that of the empty prompt.
        seed: Seed of the noise.
        settings: How points are matched; by default to the pixel with the largest cosine.
        centered: Whether the mean over both images is subtracted from each channel.
        encode: Turns images into x0; by default the model's own codec.
        batch_size: Largest number of rows in a forward pass, two for each pair.

    Returns:
        For each activation, by name, the found positions (x, y) of each pair's points in pixels of the target image.
    """
    condition = model.empty_condition(1) if condition is None else condition
    encode = encode or (lambda batch: model.codec.encode(batch.to(model.device)))
    found: dict[str, list[Tensor]] = {activation.name: [] for activation in activations}

    def matched(some: list[Pair]) -> dict[str, Tensor]:
        names = [pair.source for pair in some] + [pair.target for pair in some]
        batch = torch.stack([images[name] for name in names])
        x_t = noised(model, encode(batch), image_keys(batch), t, seed=seed)
        points = _padded([pair.source_points for pair in some]).to(x_t.device)
        places: dict[str, Tensor] = {}

        def see(name: str, maps: Tensor) -> None:
            source, target = maps.float().tensor_split(2)
            places[name] = match_points(
                {name: source},
                {name: target},
                points,
                source_size=some[0].source_size,
                target_size=some[0].target_size,
                settings=settings,
                center="pair" if centered else None,
            ).points

        activations_of(model, x_t, t, condition, activations, reduce=see)
        return places

    ordered = list(pairs)
    done = 0
    for places in InBatches(max(1, batch_size // 2))(ordered, matched):
        some = ordered[done : done + len(next(iter(places.values())))]
        done += len(some)
        for name, positions in places.items():
            rows = positions.cpu()
            found[name] += [row[: len(pair.source_points)] for row, pair in zip(rows, some, strict=True)]
    return found


def _padded(points: Sequence[Tensor]) -> Tensor:
    most = max(map(len, points))
    return torch.stack([torch.cat([rows, rows.new_zeros(most - len(rows), 2)]) for rows in points]).float()
