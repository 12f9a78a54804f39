"""Fewer activations: the same values and gradients as autograd, and less memory, for networks with constant weights."""

from typing import Any

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from diffcore.bench import peak_megabytes
from diffcore.denoiser import EDMSchedule, NetworkDenoiser
from diffcore.testing import tiny
from emd_distill.chain import ChainNoise, langevin_eps_z
from emd_distill.doctor import jacobian_norm
from emd_distill.generator import OneStepGenerator
from emd_distill.lean import lean


class Block(nn.Module):
    """A residual block as U-Nets have it, whose norm is used twice: before a SiLU and by itself."""

    def __init__(self, channels: int = 8, *, affine: bool = True) -> None:
        super().__init__()
        self.first, self.second = nn.GroupNorm(2, channels, affine=affine), nn.GroupNorm(4, channels, affine=affine)
        self.act = nn.SiLU()
        self.inner = nn.Conv2d(channels, channels, 3, padding=1)
        self.outer = nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=2, bias=False)
        self.odd = nn.Conv2d(channels, channels, 3, padding="same", padding_mode="circular")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.first(x)
        hidden = self.inner(self.act(normed)) + normed  # the norm's output has two uses
        return self.outer(self.act(self.second(self.odd(hidden) + x))) * self.act(x.mean())


class Wide(nn.Module):
    """A network whose activations are worth leaving out."""

    def __init__(self) -> None:
        super().__init__()
        norm, act = nn.GroupNorm(2, 128), nn.SiLU()
        self.net = nn.Sequential(nn.Conv2d(8, 128, 1), norm, act, nn.Conv2d(128, 8, 1))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def gradient(network: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().requires_grad_()
    y = network(x)
    return y.detach(), torch.autograd.grad((y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum(), x)[0]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["rows", "channels last"])
def test_values_and_gradients_are_those_of_autograd(layout: torch.memory_format, affine: bool):
    torch.manual_seed(0)
    network = Block(affine=affine).double().requires_grad_(False)
    for parameter in network.parameters():
        parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(3, 8, 6, 6, dtype=torch.float64).contiguous(memory_format=layout)
    plain = gradient(network, x)
    with lean(network, smallest=0):
        kept = gradient(network, x)
    for one, other in zip(plain, kept, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)
    assert plain[1].abs().max() > 0.005


def residual(seed: int = 0, **options: Any) -> ResnetBlock2D:
    """A residual block of diffusers in float64 with constant random weights, norms included."""
    block: Any = ResnetBlock2D(**{"in_channels": 8, "out_channels": 12, "temb_channels": 6, "groups": 2} | options)
    block = block.double().eval().requires_grad_(False)
    g = torch.Generator().manual_seed(seed)
    for parameter in block.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=g, dtype=torch.float64))
    return block


@pytest.mark.parametrize(
    ("options", "one_node"),
    [
        ({}, True),
        ({"out_channels": 8, "output_scale_factor": 2.0}, True),  # without a convolution beside
        ({"temb_channels": None}, True),
        ({"time_embedding_norm": "scale_shift"}, False),
        ({"up": True}, False),
        ({"down": True}, False),
        ({"skip_time_act": True}, False),
        ({"non_linearity": "gelu"}, False),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["rows", "channels last"])
def test_a_residual_block_is_one_node_where_it_is_plain(
    options: dict[str, Any], one_node: bool, layout: torch.memory_format
):
    block, g = residual(**options), torch.Generator().manual_seed(1)
    x = torch.randn(3, 8, 6, 6, generator=g, dtype=torch.float64).contiguous(memory_format=layout)
    temb = None if options.get("temb_channels", 6) is None else torch.randn(3, 6, generator=g, dtype=torch.float64)
    call: Any = lambda x: block(x, temb)  # noqa: E731
    plain = gradient(call, x)
    with lean(block):
        assert ("_Block" in type(call(x.detach().requires_grad_()).grad_fn).__name__) == one_node
        kept = gradient(call, x)
    for one, other in zip(plain, kept, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
    assert plain[1].abs().max() > 0.005


def test_a_residual_block_that_is_watched_or_learns_goes_its_own_way():
    x, temb = torch.randn(2, 8, 4, 4, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    seen: list[str] = []
    watched, dropping, shifted = residual(), residual(dropout=0.5).train(), residual()
    watched.conv1.register_forward_hook(lambda *_: seen.append("called"))
    learning = residual()
    learning.time_emb_proj.weight.requires_grad_(True)
    for block in (watched, dropping, learning):
        with lean(block):
            assert "_Block" not in type(block(x.requires_grad_(), temb).grad_fn).__name__
    assert seen == ["called"]
    with lean(shifted):  # gradients to the embedding of the time are not lost
        (found,) = torch.autograd.grad(shifted(x, temb.requires_grad_()).square().sum(), temb)
    assert found.abs().max() > 0


def test_a_single_row_whose_order_is_ambiguous_goes_torchs_own_way():
    """Its strides say channels last, its elements lie in rows: torch takes it for the former."""
    network = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU()).requires_grad_(False)
    x = torch.randn(1, 8, 4, 4)
    odd = torch.empty_strided((1, 8, 4, 4), (1, 16, 4, 1)).copy_(x)
    with lean(network, smallest=0):
        found = [gradient(network, each)[1] for each in (x, odd, x.contiguous(memory_format=torch.channels_last))]
    assert all(torch.allclose(each, gradient(network, x)[1], atol=1e-6) for each in found)


def test_a_real_unet_takes_half_the_memory():
    backbone = tiny.backbone("sd15").requires_grad_(False)
    x = torch.randn(32, 4, 16, 16, requires_grad=True)
    text = torch.randn(32, 5, backbone.config.cross_attention_dim)

    def run() -> torch.Tensor:
        return torch.autograd.grad(backbone(x, 5, text).sample.sum(), x)[0]

    plain, first = run(), peak_megabytes(run)
    with lean(backbone):
        kept, second = run(), peak_megabytes(run)
    assert torch.allclose(plain, kept, rtol=1e-4, atol=1e-5)
    assert second < 0.75 * first


def test_a_chain_is_lean_and_the_jacobian_norm_of_a_large_network_is_found():
    generator = OneStepGenerator(NetworkDenoiser(Wide(), EDMSchedule(), "edm"), 2.5)
    z = torch.randn(16, 8, 8, 8)
    assert jacobian_norm(generator, z, None, iterations=2) > 0
    called: list[str] = []
    generator.denoiser.backbone.register_forward_hook(lambda m, _, out: called.append("forward" in vars(m.net[2])))
    noise = ChainNoise(torch.randn(16, 1, 8, 8, 8), torch.randn(16, 1, 8, 8, 8))
    t = torch.full((16,), 1.0)
    networks = (generator, generator.denoiser, generator.denoiser)
    langevin_eps_z(*networks, z, torch.randn_like(z), t, gamma_e=0.1, gamma_z=0.01, noise=noise)
    assert called[0]


def test_small_activations_are_kept():
    network = Block().requires_grad_(False)
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    for smallest, name in ((x.numel(), "_ConvolutionBackward"), (x.numel() + 1, "ConvolutionBackward0")):
        with lean(network, smallest=smallest):
            assert type(network.inner(x).grad_fn).__name__ == name


def test_weights_that_learn_and_modules_of_their_own_are_left_alone():
    network = Block()
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    network(x).sum().backward()
    expected = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    with lean(network, smallest=0):
        network(x).sum().backward()
    assert all(torch.allclose(a, b.grad) for a, b in zip(expected, network.parameters(), strict=True))
    assert not any("forward" in vars(module) for module in network.modules())
    own = nn.Conv2d(1, 1, 1)
    own.forward = lambda _: torch.zeros(1)
    with lean(nn.Sequential(own)):
        assert own(torch.ones(1, 1, 1, 1)).shape == (1,)
    assert "forward" in vars(own)


def test_modules_are_as_before_after_an_error():
    network = Block()
    with pytest.raises(RuntimeError, match="stop"), lean(network):
        raise RuntimeError("stop")
    assert not any("forward" in vars(module) for module in network.modules())


def test_an_activation_in_place_and_outputs_without_gradients_are_plain():
    network = nn.Sequential(nn.GroupNorm(1, 2), nn.SiLU(inplace=True), nn.Conv2d(2, 2, 1)).requires_grad_(False)
    x = torch.randn(1, 2, 3, 3)
    with lean(network, smallest=0):
        assert torch.equal(network(x), network(x))
        assert network(x).grad_fn is None
        assert torch.allclose(gradient(network, x)[1], gradient(network, x)[1])
    with lean(lambda x: x):
        pass
