"""What looking into a network costs: hooks on every module, early exit, statistics instead of activations.

    python benchmarks/diffcore_hooks.py [--small] [--side 64] [--repeats 5]

The network has the size of SD 1.5 (860 M parameters, random weights, 3.4 GB in float32); ``--small`` takes one of
0.8 M parameters, on which the same hooks weigh far more, and checks agreement only.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffcore.bench import Case, run_cases
from diffcore.hooks import Activations, capture, match

SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SMALL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
}
EXITS = ["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v", "mid_block", "up_blocks.0"]

Forward = Callable[[], Tensor]


def network(config: dict[str, Any], side: int, batch: int) -> tuple[nn.Module, Forward]:
    """Returns a U-Net with random weights and its forward pass on fixed inputs, without gradients."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**config).eval().requires_grad_(False)
        x_t = torch.randn(batch, 4, side, side)
        states = torch.randn(batch, 77, config["cross_attention_dim"])

    @torch.no_grad()
    def forward() -> Tensor:
        return unet(x_t, 500, encoder_hidden_states=states, return_dict=False)[0]

    return unet, forward


def every_module_case(unet: nn.Module, forward: Forward, sizes: dict[str, int | str]) -> Case:
    """Hooks on all modules, keeping nothing, beside the bare pass: at most 3 % of it."""

    def hooked() -> Tensor:
        with capture(unet, "*", reduce=lambda name, x: None):
            return forward()

    return Case(f"hooks on {len(match(unet, '*'))} modules", sizes, hooked, forward, torch.equal, goal=1 / 1.03)


def early_exit_cases(unet: nn.Module, forward: Forward, sizes: dict[str, int | str]) -> list[Case]:
    """A pass that ends at a module beside a whole one; the name of the case holds the share of the FLOPs."""
    return [_early_exit_case(unet, forward, sizes, name) for name in EXITS]


def _early_exit_case(unet: nn.Module, forward: Forward, sizes: dict[str, int | str], name: str) -> Case:
    def until() -> Tensor:
        return caught(unet, forward, name, stop=True)[name]

    def whole() -> Tensor:
        return caught(unet, forward, name, stop=False)[name]

    share = num_flops(until) / num_flops(whole)
    # Ending early is worth it as far as FLOPs say, but for modules that are slow for their FLOPs.
    return Case(f"stop at {name} ({100 * share:.1f} % of the FLOPs)", sizes, until, whole, torch.equal)


def statistics_case(unet: nn.Module, forward: Forward, sizes: dict[str, int | str]) -> Case:
    """Mean and standard deviation per channel of all activations, in the hooks, beside storing them first."""

    def streamed() -> dict[str, Tensor]:
        with capture(unet, "*", reduce=lambda name, x: moments(x)) as statistics:
            forward()
        return dict(statistics)

    def stored() -> dict[str, Tensor]:
        with capture(unet, "*") as activations:
            forward()
        return {name: moments(x) for name, x in activations.items()}

    def agree(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
        return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

    return Case("statistics of all activations", sizes, streamed, stored, agree, memory_goal=1 / 0.15)


def moments(x: Tensor) -> Tensor:
    """Returns mean and standard deviation per channel: dimension 1 of maps, the last one of all else."""
    rest = (0, 2, 3) if x.ndim == 4 else tuple(range(x.ndim - 1))
    std, mean = torch.std_mean(x, rest, correction=0)
    return torch.stack([mean, std])


def caught(unet: nn.Module, forward: Forward, name: str, *, stop: bool) -> Activations:
    with capture(unet, name, stop=stop) as activations:
        forward()
    return activations


def num_flops(function: Callable[[], object]) -> int:
    """Returns the floating-point operations of matrix products, convolutions and attention."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def cases(*, small: bool = False, side: int = 64, batch: int = 1) -> list[Case]:
    """Returns all cases, on one network."""
    side = min(side, 8) if small else side
    unet, forward = network(SMALL if small else SD15, side, batch)
    sizes: dict[str, int | str] = {"latent": f"{batch}x4x{side}x{side}"}
    hooks = every_module_case(unet, forward, sizes)
    return [hooks, *early_exit_cases(unet, forward, sizes), statistics_case(unet, forward, sizes)]


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what looking into a network costs.")
    parser.add_argument("--small", action="store_true", help="0.8 M parameters; checks agreement only")
    parser.add_argument("--side", type=int, default=64, help="side of the latents")
    parser.add_argument("--batch", type=int, default=1, help="rows")
    parser.add_argument("--repeats", type=int, default=5, help="timed pairs per case")
    options = parser.parse_args()
    found = cases(small=options.small, side=options.side, batch=options.batch)
    return run_cases(found, smoke=options.small, repeats=options.repeats)


if __name__ == "__main__":
    sys.exit(main())
