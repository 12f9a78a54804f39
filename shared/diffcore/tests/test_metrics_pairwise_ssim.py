import importlib
import math
import warnings
from itertools import combinations

import pytest
import torch
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from diffcore.metrics import PairwiseSSIM, pairwise_ssim
from diffcore.metrics.pairwise_ssim import smallest_side
from diffcore.testing.metrics import check_metric


def pictures(prompts: int, seeds: int, channels: int, height: int, width: int) -> torch.Tensor:
    """Seeds of a prompt share a picture, more of it from prompt to prompt; float16 holds the values exactly."""
    generator = torch.Generator().manual_seed(height)
    shared = torch.rand(prompts, 1, channels, height, width, generator=generator)
    own = torch.rand(prompts, seeds, channels, height, width, generator=generator)
    share = torch.linspace(0.2, 0.9, prompts).view(-1, 1, 1, 1, 1)
    return (share * shared + (1 - share) * own).half().float()


def library(images: torch.Tensor, data_range: float, betas: tuple[float, ...] | None = None) -> torch.Tensor:
    """torchmetrics, pair by pair, in float64: in float32 it loses up to 1e-5 to cancellation."""
    images = images.double()
    options = {"data_range": data_range, "reduction": "none"}
    values = []
    for seeds in images:
        for a, b in combinations(seeds, 2):
            if betas is None:
                values.append(structural_similarity_index_measure(a[None], b[None], **options))
            else:
                values.append(multiscale_structural_similarity_index_measure(a[None], b[None], betas=betas, **options))
    return torch.stack(values).view(len(images), -1)


def close(ours: torch.Tensor, theirs: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(ours.double(), theirs.double(), atol=atol, rtol=0)


@pytest.mark.parametrize("chunk", [2**20, 1000])
@pytest.mark.parametrize("size", [(4, 32, 64), (1, 6, 9), (3, 33, 20)], ids=str)
def test_ssim_equals_torchmetrics(size, chunk, monkeypatch):
    monkeypatch.setattr(importlib.import_module("diffcore.metrics.pairwise_ssim"), "_NUMBERS", chunk)
    images = pictures(3, 4, *size)
    close(pairwise_ssim(images, data_range=1.0), library(images, 1.0), 1e-6)
    wide = 255 * images.double() - 100
    close(pairwise_ssim(wide, data_range=255.0), library(wide, 255.0), 1e-9)


@pytest.mark.parametrize(
    ("side", "scales", "betas"), [(64, 3, (0.33, 0.33, 0.33)), (45, 2, (0.5, 0.5)), (176, 5, None)]
)
def test_ms_ssim_equals_torchmetrics(side, scales, betas):
    images = pictures(2, 3, 2, side, side + 1)
    theirs = library(images, 1.0, betas or (0.0448, 0.2856, 0.3001, 0.2363, 0.1333))
    ours = pairwise_ssim(images, data_range=1.0, scales=scales, betas=betas)
    close(ours, theirs, 1e-6)


def test_ssim_equals_its_definition():
    """Windows are cut out of the reflected picture and weighted one by one."""
    window = 7
    a, b = pictures(1, 2, 1, 9, 8).double()[0, :, 0]
    taps = torch.tensor([math.exp(-(k**2) / (2 * 1.5**2)) for k in range(-3, 4)], dtype=torch.float64)
    weights = torch.outer(taps, taps) / taps.sum() ** 2
    padded = [torch.nn.functional.pad(x[None], (3, 3, 3, 3), mode="reflect")[0] for x in (a, b)]
    values = []
    for row in range(9):
        for column in range(8):
            p, q = (x[row : row + window, column : column + window] for x in padded)
            mp, mq = (weights * p).sum(), (weights * q).sum()
            vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
            cov = (weights * (p - mp) * (q - mq)).sum()
            c1, c2 = 0.01**2, 0.03**2
            values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    ours = pairwise_ssim(torch.stack([a, b])[None, :, None], data_range=1.0, window=window)
    assert float(ours) == pytest.approx(float(torch.stack(values).mean()), abs=1e-12)


@pytest.mark.parametrize(("options", "side"), [({}, 16), ({"scales": 2, "betas": (0.33, 0.33)}, 16)], ids=str)
def test_however_the_rows_arrive(options, side):
    images = pictures(7, 3, 2, side, side)
    per_prompt = library(images, 1.0, options.get("betas")).mean(1)
    reference = (per_prompt.mean(), per_prompt.std(correction=0) / 6**0.5, 7)
    batches = [(images[:3],), (images[3:],)]
    check_metric(lambda: PairwiseSSIM(data_range=1.0, **options), batches, reference, atol=1e-6, half_atol=1e-6)


def test_closed_forms():
    flat = torch.tensor([0.2, 0.6]).view(1, 2, 1, 1, 1).expand(1, 2, 3, 12, 12)
    c1 = 1e-4
    expected = (2 * 0.2 * 0.6 + c1) / (0.2**2 + 0.6**2 + c1)  # constant images differ by luminance alone
    assert float(pairwise_ssim(flat, data_range=1.0)) == pytest.approx(expected, rel=1e-5)
    one = pictures(1, 1, 3, 48, 48)
    for scales in (1, 3):
        assert float(pairwise_ssim(one.repeat(1, 2, 1, 1, 1), data_range=1.0, scales=scales)) == pytest.approx(1)
    opposite = torch.stack([one[0], 1 - one[0]], dim=1)
    assert float(pairwise_ssim(opposite, data_range=1.0, scales=3)) == 0  # cut off, where SSIM is negative
    assert float(pairwise_ssim(opposite, data_range=1.0)) < 0


def test_a_pair_does_not_depend_on_the_batch():
    images = pictures(3, 4, 2, 24, 24)
    whole = pairwise_ssim(images, data_range=1.0)
    alone = pairwise_ssim(images[1:2, [0, 2]], data_range=1.0)
    close(whole[1, 1], alone[0, 0], 1e-6)
    assert pairwise_ssim(images[:0], data_range=1.0).shape == (0, 6)


def test_small_images_take_fewer_scales():
    assert [smallest_side(scales) for scales in (1, 2, 3, 4, 5)] == [6, 12, 44, 99, 176]
    images, third = pictures(1, 3, 1, 43, 50), (0.33, 0.33, 0.33)
    with pytest.warns(UserWarning, match="side of 43 allow 2 of 3 scales"):
        fallen = pairwise_ssim(images, data_range=1.0, scales=3, betas=third)
    close(fallen, library(images, 1.0, third[:2]), 1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairwise_ssim(pictures(1, 2, 1, 44, 44), data_range=1.0, scales=3)
    with pytest.raises(ValueError, match="side of 5; a window of 11 needs at least 6"):
        pairwise_ssim(pictures(1, 2, 1, 5, 9), data_range=1.0)


def test_bad_input_is_named():
    images = pictures(3, 2, 1, 8, 8)
    with pytest.raises(TypeError, match="data_range"):
        PairwiseSSIM()
    for options, message in [
        ({"data_range": 0.0}, "`data_range` is 0"),
        ({"data_range": 1.0, "window": 4}, "`window` is 4"),
        ({"data_range": 1.0, "scales": 6}, "`scales` is 6"),
        ({"data_range": 1.0, "scales": 3, "betas": (0.5, 0.5)}, "`betas` has 2 numbers for 3 scales"),
    ]:
        with pytest.raises(ValueError, match=message):
            PairwiseSSIM(**options)
    with pytest.raises(ValueError, match="1 seeds per prompt"):
        pairwise_ssim(images[:, :1], data_range=1.0)
    images[2, 0, 0, 1, 1] = torch.nan
    with pytest.raises(ValueError, match="images has NaN or infinity in 1 of 3 rows: 2;"):
        pairwise_ssim(images, data_range=1.0)
    with pytest.raises(ValueError, match="no prompts"):
        PairwiseSSIM(data_range=1.0).compute()
