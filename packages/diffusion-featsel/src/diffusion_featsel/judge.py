"""How good every activation is by labels, each alone, in one or two passes over the images: no map is stored.

Key points are matched inside the hooks. For segmentation, a first pass over the training images adds up the moments of
each activation and the labels, from which ridge regression is solved; a second pass predicts the test images.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from diffcore.batching import InBatches
from diffcore.models import DiffusionModel
from diffusion_featsel.activation import Activation
from diffusion_featsel.forward import Condition, activations_of, noised
from diffusion_featsel.gram import GramAccumulator, labels_on_grid, on_grid
from diffusion_featsel.match import MatchSettings, match_points
from diffusion_featsel.pairs import Pair
from diffusion_featsel.prepare import image_keys
from diffusion_featsel.ridge import fit_ridge
from diffusion_featsel.segmentation import SegmentationScores, segmentation_scores
from diffusion_featsel.splits import Split


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
        model: The diffusion model that is run.
        images: Images in [0, 1] by the names that pairs have for them, of the size that activations were listed for.
        pairs: Pairs of images with key points in pixels of these images.
        activations: Activations to match with, each alone.
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


def segment(
    model: DiffusionModel,
    images: Float[Tensor, "n 3 h w"],
    labels: Integer[Tensor, "n height width"],
    split: Split,
    activations: Sequence[Activation],
    *,
    num_classes: int,
    grid: tuple[int, int] = (64, 64),
    t: float = 50.0,
    condition: Condition | None = None,
    seed: int = 0,
    encode: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 48,
    num_pieces: int = 8,
) -> dict[str, SegmentationScores]:
    """Measures how well a ridge regression reads the classes of pixels from each activation alone.

    Args:
        model: The diffusion model that is run.
        images: Images in [0, 1], of the size that the activations were listed for.
        labels: Class of each pixel, at any size; 255 where a pixel does not count.
        split: Training and test images.
        activations: Activations that classes are read from, each alone.
        num_classes: Number of classes that exist.
        grid: Rows and columns that features and labels are brought to.
        t: Timestep of the noise, in the units of the model's schedule.
        condition: Condition of the backbone, one row for all images; by default that of the empty prompt.
        seed: Seed of the noise.
        encode: Turns images into x0; by default the model's own codec.
        batch_size: Largest number of rows in a forward pass.
        num_pieces: Number of parts of the training images by which the strength of the ridge is chosen.

    Returns:
        Scores on the test images, by the name of the activation.

    Raises:
        ValueError: A label does not exist.
    """
    condition = model.empty_condition(1) if condition is None else condition
    encode = encode or (lambda batch: model.codec.encode(batch.to(model.device)))
    in_batches = InBatches(batch_size)

    def on_common_grid(rows: list[int]) -> dict[str, Tensor]:
        batch = images[rows]
        x_t = noised(model, encode(batch), image_keys(batch), t, seed=seed)
        return activations_of(
            model, x_t, t, condition, activations, reduce=lambda name, maps: on_grid({name: maps.float()}, grid)
        )

    pieces = min(num_pieces, len(split.train))
    sums = {a.name: GramAccumulator({a.name: a.channels}, num_classes, grid, pieces) for a in activations}
    # Sums change only once a batch is through: one that ran out of memory is tried again in halves.
    for rows, maps in in_batches(list(split.train), lambda rows: (rows, on_common_grid(rows))):
        for name, values in maps.items():
            sums[name].update({name: values}, labels[rows].long().to(values.device))
    fits = {name: fit_ridge(total.compute()) for name, total in sums.items()}
    predicted: dict[str, list[Tensor]] = {activation.name: [] for activation in activations}
    for maps in in_batches(list(split.test), on_common_grid):
        for name, values in maps.items():
            predicted[name].append(fits[name](values.movedim(1, 3)).argmax(-1).cpu())
    true = labels_on_grid(labels[list(split.test)].long(), grid)
    return {name: segmentation_scores(torch.cat(found), true, num_classes) for name, found in predicted.items()}


def _padded(points: Sequence[Tensor]) -> Tensor:
    most = max(map(len, points))
    return torch.stack([torch.cat([rows, rows.new_zeros(most - len(rows), 2)]) for rows in points]).float()
