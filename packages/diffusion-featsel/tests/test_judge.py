"""Judging by labels inside the hooks gives what captured maps give, from batches of any size."""

from typing import Any

import pytest
import torch
from torch import Tensor

import diffusion_featsel.judge
from diffcore.models import DiffusionModel
from diffcore.testing import tiny
from diffusion_featsel.activation import Activation
from diffusion_featsel.forward import activations_of, noised
from diffusion_featsel.gram import GramAccumulator, labels_on_grid, on_grid
from diffusion_featsel.inventory import inventory
from diffusion_featsel.judge import find_points, segment
from diffusion_featsel.match import MatchSettings, match_points
from diffusion_featsel.pairs import Pair
from diffusion_featsel.prepare import image_keys
from diffusion_featsel.ridge import fit_ridge
from diffusion_featsel.segmentation import segmentation_scores
from diffusion_featsel.splits import Split

NAMES = ["down-level0-repeat0-res-out", "mid-vit-block0-self-q", "up-level1-repeat0-res-out"]
T = 120.0
CONDITION = {"encoder_hidden_states": torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1))}


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    return tiny.model("sd15")


@pytest.fixture(scope="module")
def images() -> Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.nn.functional.interpolate(torch.rand(12, 3, 6, 6, generator=g), (16, 16), mode="bilinear")


def chosen(model: DiffusionModel) -> list[Activation]:
    return inventory(model).named(NAMES)


@pytest.fixture(scope="module")
def maps(model: DiffusionModel, images: Tensor) -> dict[str, Tensor]:
    """Returns all maps of all images, each image in a pass of its own."""
    parts = []
    for image in images.split(1):
        x_t = noised(model, model.codec.encode(image), image_keys(image), T, seed=3)
        parts.append(activations_of(model, x_t, T, CONDITION, chosen(model)))
    return {name: torch.cat([part[name] for part in parts]) for name in NAMES}


def pairs_of() -> list[Pair]:
    """Returns pairs of images with different numbers of points; images occur in several."""
    g = torch.Generator().manual_seed(2)
    pairs = []
    for source, target, count in ((0, 1, 4), (2, 0, 1), (5, 7, 3), (1, 2, 6), (3, 11, 2)):
        places = 15 * torch.rand(2, count, 2, generator=g)
        pairs.append(Pair(str(source), str(target), places[0], places[1], (16, 16), (16, 16)))
    return pairs


@pytest.mark.parametrize("batch_size", [1, 4, 100])
@pytest.mark.parametrize("centered", [True, False])
def test_points_are_those_of_captured_maps(
    model: DiffusionModel, images: Tensor, maps: dict[str, Tensor], batch_size: int, centered: bool
) -> None:
    by_name = {str(number): image for number, image in enumerate(images)}
    found = find_points(
        model, by_name, pairs_of(), chosen(model), t=T, condition=CONDITION, seed=3, centered=centered,
        batch_size=batch_size,
    )  # fmt: skip
    assert set(found) == set(NAMES)
    for name in NAMES:
        assert len(found[name]) == len(pairs_of())
        for pair, places in zip(pairs_of(), found[name], strict=True):
            source, target = ({name: maps[name][[int(image)]]} for image in (pair.source, pair.target))
            expected = match_points(
                source, target, pair.source_points[None], source_size=(16, 16), target_size=(16, 16),
                center="pair" if centered else None,
            )  # fmt: skip
            torch.testing.assert_close(places, expected.points[0])


def test_points_of_wide_images_are_matched_as_asked_at_the_usual_timestep(model: DiffusionModel) -> None:
    g = torch.Generator().manual_seed(0)
    wide = torch.nn.functional.interpolate(torch.rand(2, 3, 6, 9, generator=g), (16, 24), mode="bilinear")
    points = torch.rand(1, 5, 2, generator=g) * torch.tensor([23.0, 15.0])
    pair = Pair("a", "b", points[0], points[0], (16, 24), (16, 24))
    (activation,) = inventory(model, size=(8, 12)).named(NAMES[:1])
    settings = MatchSettings(matcher="window")
    found = find_points(
        model, dict(zip("ab", wide, strict=True)), [pair], [activation], condition=CONDITION, settings=settings
    )
    x_t = noised(model, model.codec.encode(wide), image_keys(wide), 50.0)
    seen = activations_of(model, x_t, 50.0, CONDITION, [activation])
    source, target = ({name: part} for name, maps in seen.items() for part in maps.split(1))
    expected = match_points(
        source, target, points, source_size=(16, 24), target_size=(16, 24), settings=settings, center="pair"
    )
    torch.testing.assert_close(found[activation.name][0], expected.points[0])


def test_a_pass_has_at_most_as_many_rows_as_said(
    model: DiffusionModel, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []

    def counted(model: DiffusionModel, x_t: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(x_t))
        return activations_of(model, x_t, *args, **kwargs)

    monkeypatch.setattr(diffusion_featsel.judge, "activations_of", counted)
    by_name = {str(number): image for number, image in enumerate(images)}
    find_points(model, by_name, pairs_of(), chosen(model)[:1], t=T, condition=CONDITION, batch_size=4)
    assert rows == [4, 4, 2]


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_segmentation_is_ridge_regression_on_captured_maps(
    model: DiffusionModel, images: Tensor, maps: dict[str, Tensor], batch_size: int
) -> None:
    g = torch.Generator().manual_seed(4)
    labels = torch.randint(0, 3, (12, 4, 4), generator=g).repeat_interleave(4, 1).repeat_interleave(4, 2)
    labels[0, :3] = 255
    labels[9, 5:8] = 255
    split = Split((0, 2, 3, 5, 7, 8, 10), (9, 1, 4, 6))
    found = segment(
        model, images, labels, split, chosen(model), num_classes=3, grid=(8, 8), t=T, condition=CONDITION, seed=3,
        batch_size=batch_size, num_pieces=3,
    )  # fmt: skip
    train, test = list(split.train), list(split.test)
    for name in NAMES:
        values = on_grid({name: maps[name]}, (8, 8))
        sums = GramAccumulator({name: values.shape[1]}, 3, (8, 8), 3)
        sums.update({name: values[train]}, labels[train])
        predicted = fit_ridge(sums.compute())(values[test].movedim(1, 3)).argmax(-1)
        expected = segmentation_scores(predicted, labels_on_grid(labels[test], (8, 8)), 3)
        assert found[name].miou == pytest.approx(expected.miou, abs=0.02)
        assert found[name].pixel_accuracy == pytest.approx(expected.pixel_accuracy, abs=0.02)


def test_classes_are_read_at_their_places_and_in_their_images(model: DiffusionModel) -> None:
    """A network input that is bright where the class is 1 lets most pixels be read, from unlike halves of images."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.nn.functional.interpolate(torch.randint(2, (8, 1, 4, 4), generator=generator).float(), (16, 16))
    images = (0.8 * labels + 0.1).expand(-1, 3, -1, -1)

    def encode(batch: Tensor) -> Tensor:
        return 4 * torch.nn.functional.avg_pool2d(batch[:, :1], 2).expand(-1, 4, -1, -1) - 2

    split = Split((6, 0, 3, 5, 2), (7, 1, 4))
    found = segment(
        model, images, labels[:, 0].long(), split, chosen(model)[:1], num_classes=2, grid=(8, 8), t=T, encode=encode,
        condition=CONDITION, batch_size=2,
    )  # fmt: skip
    assert found[NAMES[0]].pixel_accuracy > 0.9
