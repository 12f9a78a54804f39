"""The tiny models are what they claim to be: every family runs, and no matrix hides behind zeros."""

import pytest
import torch

from diffcore.testing import tiny


@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_family_runs_and_is_nowhere_zero(name):
    denoiser = tiny.denoiser(name)
    x_t, t, cond = tiny.inputs(name, batch=3)
    prediction = denoiser(x_t, t, cond)
    assert prediction.output.shape == x_t.shape
    assert 0.05 < prediction.output.std() < 5
    assert all(p.any() for p in denoiser.parameters() if p.ndim > 1)
    assert (prediction.extra is not None) == (name in ("dit", "pixart"))


def test_a_seed_fixes_the_weights_and_leaves_the_global_stream_alone():
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first, again, other = tiny.backbone("dit"), tiny.backbone("dit"), tiny.backbone("dit", seed=1)
    assert torch.equal(torch.rand(2), expected)
    weights = [next(iter(model.parameters())) for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
