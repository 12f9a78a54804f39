"""The parts of an activation's variance, and the scores from them, on features whose parts are known."""

import math

import pytest
import torch
from torch import Tensor

from diffcore.testing.distributed import run_forked
from diffusion_featsel.readout import ReadoutSums, Targets, places_of
from diffusion_featsel.variance import VarianceSums
from diffusion_featsel.views import Batch, Views, grouped, projection_of

GRID = (4, 4)


def batch_of(n: int, first: int = 0, noise: Tensor | None = None, grid: tuple[int, int] = GRID) -> Batch:
    groups = tuple(range(g.start + first, g.stop + first) for g in grouped(n))
    empty = torch.empty(n, 0, 2)
    noise = torch.zeros(2, n, 4, *grid) if noise is None else noise
    return Batch(groups, torch.zeros(n, 4, *grid), noise, empty, empty, empty)


def model_features(
    n: int, channels: int, *, position: float, content: float, noise: float, mean: float = 0.0
) -> Tensor:
    """Draws f = mu + P_p + S_ip + E_ikp with given variances per channel, for two draws."""
    g = torch.Generator().manual_seed(n)
    template = position**0.5 * torch.randn(1, 1, channels, *GRID, generator=g)
    image = content**0.5 * torch.randn(1, n, channels, *GRID, generator=g)
    draw = noise**0.5 * torch.randn(2, n, channels, *GRID, generator=g)
    return mean + template + image + draw


def sums_of(features: Tensor, first: int = 0, batch: Batch | None = None) -> VarianceSums:
    sums = VarianceSums.empty(features.shape[2], GRID)
    sums.add(Views(batch or batch_of(features.shape[1], first), features, None, None))
    return sums


def test_parts_of_the_gaussian_model_within_three_standard_errors() -> None:
    n, c, places = 400, 32, 16
    split = sums_of(model_features(n, c, position=0.25, content=0.485, noise=1.21, mean=3.0)).split()
    # A variance of v from m independent normal values has the standard error v sqrt(2 / m).
    assert split.noise / c == pytest.approx(1.21, abs=3 * 1.21 * math.sqrt(2 / (n * places * c)))
    assert split.content / c == pytest.approx(0.485, abs=3 * (0.485 + 1.21) * math.sqrt(2 / (n * places * c)))
    template_error = 0.25 * math.sqrt(2 / (places * c)) + (0.25 + 0.485 + 1.21) / math.sqrt(n * places * c)
    assert split.position / c == pytest.approx(0.25, abs=3 * template_error)


def test_no_bias_from_few_images() -> None:
    """Averaged over many draws of a small data set, each part is right: no square of a mean is left in."""
    parts = []
    for seed in range(300):
        torch.manual_seed(seed)
        features = torch.randn(1, 1, 1, *GRID) + 0.7 * torch.randn(1, 4, 1, *GRID) + torch.randn(2, 4, 1, *GRID)
        split = sums_of(features).split()
        parts.append((split.position, split.content, split.noise))
    mean = torch.tensor(parts).mean(0)
    error = torch.tensor(parts).std(0) / len(parts) ** 0.5
    # The template's variance is taken about its mean over the 16 places of one template, so 15/16 of it is expected.
    expected = torch.tensor([15 / 16, 0.49, 1.0])
    assert ((mean - expected).abs() < 3.5 * error).all(), (mean, error)


def test_the_parts_sum_to_the_total_variance() -> None:
    features = model_features(64, 8, position=0.5, content=1.0, noise=0.3, mean=2.0).double()
    split = sums_of(features).split()
    total = features.flatten(0, 1).transpose(0, 1).flatten(1).var(1).sum()
    assert split.position + split.content + split.noise == pytest.approx(float(total), rel=0.02)


def test_two_batches_merge_to_one() -> None:
    features = model_features(24, 8, position=0.5, content=1.0, noise=0.3)
    whole = sums_of(features)
    parts = sums_of(features[:, :8])
    parts.merge(sums_of(features[:, 8:], first=8))
    torch.testing.assert_close(parts.flat(), whole.flat(), rtol=1e-4, atol=1e-3)
    stored = VarianceSums.empty(8, GRID)
    stored.load(whole.flat())
    assert stored.split() == whole.split()


def _summed(rank: int) -> float:
    features = model_features(16, 8, position=0.5, content=1.0, noise=0.3)
    flat = sums_of(features[:, 8 * rank : 8 * rank + 8], first=8 * rank).flat()
    torch.distributed.all_reduce(flat)
    total = VarianceSums.empty(8, GRID)
    total.load(flat)
    return total.split().content


def test_two_processes_add_up_to_one() -> None:
    features = model_features(16, 8, position=0.5, content=1.0, noise=0.3)
    alone = sums_of(features).split().content
    assert run_forked(_summed) == [pytest.approx(alone, rel=1e-6)] * 2


@pytest.mark.parametrize(("content", "noise"), [(1.0, 1.0), (3.0, 1.0), (0.2, 1.0)])
def test_scores_have_their_closed_forms(content: float, noise: float) -> None:
    split = sums_of(model_features(600, 16, position=0.0, content=content, noise=noise)).split()
    assert split.reliability == pytest.approx(content / (content + noise), abs=0.02)
    assert split.snr_db == pytest.approx(10 * math.log10(content / noise), abs=0.2)
    assert split.fisher == pytest.approx(content / noise, rel=0.05)
    assert split.information == pytest.approx(8 * math.log(1 + content / noise), rel=0.05)
    assert split.effective_rank == pytest.approx(16, rel=0.02)


def test_noise_alone_has_no_content() -> None:
    split = sums_of(model_features(600, 16, position=0.0, content=0.0, noise=1.0)).split()
    assert split.fisher == pytest.approx(0, abs=0.03)
    assert split.reliability == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("seed", range(5))
def test_the_planted_activation_has_the_highest_score(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (32, *GRID), generator=g)
    planted = torch.nn.functional.one_hot(labels, 4).movedim(-1, 1)[None] + torch.randn(2, 32, 4, *GRID, generator=g)
    others = [torch.randn(2, 32, 4, *GRID, generator=g) for _ in range(8)]
    scores = [sums_of(features).split().fisher for features in (planted, *others)]
    assert max(range(9), key=lambda index: scores[index] or 0.0) == 0


def test_coordinates_are_all_template() -> None:
    features = places_of(GRID, 32, torch.device("cpu")) + 0.001 * torch.randn(2, 32, 2, *GRID)
    split = sums_of(features).split()
    assert split.position_share is not None
    assert split.position_share > 0.99


@pytest.mark.parametrize("value", [3.0, 1 / 3, 123.456])
def test_a_constant_activation_has_no_score(value: float) -> None:
    split = sums_of(torch.full((2, 16, 4, *GRID), value)).split()
    assert split.reliability is None
    assert split.fisher is None


def test_a_template_alone_has_no_score() -> None:
    template = 5 + torch.randn(1, 1, 4, *GRID, generator=torch.Generator().manual_seed(0))
    split = sums_of(template.repeat(2, 16, 1, 1, 1)).split()
    assert split.position > 1
    assert split.reliability is None


def test_a_large_mean_takes_no_digits_from_the_parts() -> None:
    features = model_features(64, 8, position=0.5, content=1.0, noise=0.3)
    plain, far = sums_of(features).split(), sums_of(features + 1e4).split()
    assert far.content == pytest.approx(plain.content, rel=1e-2)
    assert far.position == pytest.approx(plain.position, rel=1e-2)
    targets = features[:, :, :2] + torch.randn(2, 64, 2, *GRID)
    assert readout(features + 1e4, targets) == pytest.approx(readout(features, targets), abs=1e-2)


def test_a_single_image_is_refused() -> None:
    with pytest.raises(ValueError, match="1 image has no variance of content"):
        sums_of(torch.randn(2, 1, 4, *GRID)).split()


def readout(features: Tensor, targets: Tensor) -> float | None:
    batch = batch_of(features.shape[1])
    variance = sums_of(features, batch=batch)
    sums = ReadoutSums.empty(features.shape[2], targets.shape[2])
    sums.add(Views(batch, features, None, None), Targets.of(targets))
    return sums.r2(variance.second)


def test_a_readout_is_that_of_scikit_learn() -> None:
    from sklearn.linear_model import LinearRegression

    g = torch.Generator().manual_seed(0)
    features = 2 + torch.randn(2, 12, 6, *GRID, generator=g)
    targets = torch.einsum("knchw,cd->kndhw", features, torch.randn(6, 3, generator=g))
    targets = targets + 3 * torch.randn(2, 12, 3, *GRID, generator=g)
    rows = [part[:, half::2].movedim(2, -1).flatten(0, 3).numpy() for half in range(2) for part in (features, targets)]
    expected = LinearRegression().fit(rows[0], rows[1]).score(rows[2], rows[3])
    assert readout(features, targets) == pytest.approx(expected, abs=1e-3)


def test_noise_is_read_out_of_itself_and_not_out_of_content() -> None:
    noise = torch.randn(2, 24, 4, *GRID)
    content = torch.randn(1, 24, 8, *GRID).repeat(2, 1, 1, 1, 1)
    assert readout(torch.cat([noise, content], 2), noise) == pytest.approx(1, abs=1e-3)
    leak = readout(content, noise)
    assert leak is not None
    assert leak < 0.05


def test_a_projection_keeps_lengths_on_average() -> None:
    projection = projection_of("up-level0-repeat0-res-out", 320, torch.device("cpu"))
    assert projection is not None
    rows = projection.double() @ projection.double().T
    torch.testing.assert_close(rows, 5 * torch.eye(64, dtype=torch.float64), atol=1e-5, rtol=0)
    assert projection_of("any", 64, torch.device("cpu")) is None
