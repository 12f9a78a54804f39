"""Statistics of inner activations over a data set: `hooks.stream` beside a whole pass that stores everything first.

    python benchmarks/diffcore_stream.py [--small] [--channels 96] [--images 4] [--repeats 5]

The network is a U-Net of SD's plan with random weights, by default of 0.3 of SD 1.5's width. Both sides run the same
batches on the same noise; the plain one hooks the same modules, runs to the end, keeps the activations on the CPU, and
computes the same means and standard deviations from what it kept.
"""

import argparse
import sys
from typing import Any

import torch
from torch import Tensor

from diffcore.bench import Case, run_cases
from diffcore.denoiser import DiscreteSchedule, NetworkDenoiser
from diffcore.hooks import stream
from diffcore.models import DiffusionModel, backbone_call, site_table
from diffcore.models.codec import MissingCodec
from diffcore.noise import row_noise

SITES = {
    "down stage and middle": ["down_blocks.*", "mid_block.*"],
    "first half of the up stage": ["up_blocks.0.*", "up_blocks.1.*"],
    "everything": ["*"],
}
TIMES = (50, 200)


def unet(channels: int, side: int) -> DiffusionModel:
    """Returns a U-Net of SD's plan with random weights, whose images are latents already."""
    from diffusers import UNet2DConditionModel

    widths = (channels, 2 * channels, 4 * channels, 4 * channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: Any = UNet2DConditionModel(
            sample_size=side, block_out_channels=widths, cross_attention_dim=768, attention_head_dim=8
        )
    network.eval().requires_grad_(False)
    denoiser = NetworkDenoiser(network, DiscreteSchedule(), "epsilon", call=backbone_call(network))
    return DiffusionModel("bench", "bench", denoiser, MissingCodec("bench"), None, None, {}, {})


def moments(name: str, x: Tensor) -> Tensor:
    """Returns mean and standard deviation per image and channel: dimension 1 of maps, the last one of all else."""
    del name
    rest = tuple(range(2, x.ndim)) if x.ndim == 4 else tuple(range(1, x.ndim - 1))
    std, mean = torch.std_mean(x, rest, correction=0) if rest else (torch.zeros_like(x), x)
    return torch.stack([mean, std], dim=1)


def streamed(model: DiffusionModel, x0: Tensor, sites: list[str], batch_size: int) -> list[dict[str, Tensor]]:
    """Reduces in the hooks, and ends each pass at the last site."""
    cond = {"encoder_hidden_states": torch.zeros(1, 77, 768)}
    batches = stream(model, x0, sites, t=TIMES, cond=cond, reduce=moments, batch_size=batch_size, encoded=True)
    return [dict(batch.activations) for batch in batches]


@torch.no_grad()
def stored(model: DiffusionModel, x0: Tensor, names: list[str], batch_size: int) -> list[dict[str, Tensor]]:
    """Runs each pass to its end with plain hooks, and computes the statistics from the activations of all passes."""
    kept: list[dict[str, Tensor]] = []

    def hook(name: str) -> Any:
        def keep(module: Any, args: Any, output: Any) -> None:
            first = output if isinstance(output, Tensor) else output[0]
            kept[-1].setdefault(name, first.detach().cpu().clone())

        return keep

    handles = [model.backbone.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    for start in range(0, len(x0), batch_size):
        rows = range(start, min(start + batch_size, len(x0)))
        noise = row_noise(0, rows, x0.shape[1:])
        for time in TIMES:
            kept.append({})
            t = torch.full((len(rows),), float(time))
            x_t = model.denoiser.schedule.add_noise(x0[start : rows.stop], noise, t)
            model.denoiser(x_t, t, {"encoder_hidden_states": torch.zeros(len(rows), 77, 768)})
    for handle in handles:
        handle.remove()
    return [{name: moments(name, x) for name, x in activations.items()} for activations in kept]


def agree(ours: list[dict[str, Tensor]], reference: list[dict[str, Tensor]]) -> bool:
    """Whether both hold the same bits."""
    return len(ours) == len(reference) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        for a, b in zip(ours, reference, strict=True)
    )


def cases(
    *, small: bool = False, channels: int = 96, side: int = 32, images: int = 4, batch_size: int = 2
) -> list[Case]:
    """Returns one case per set of sites, all on one network; small ones check agreement only."""
    if small:
        channels, side = 32, 8
    model = unet(channels, side)
    x0 = torch.randn(images, 4, side, side, generator=torch.Generator().manual_seed(0))
    table = site_table(model.backbone)
    found = []
    for title, patterns in SITES.items():
        chosen = [row for row in table.match(patterns) if row.site.at == "output" and row.name]
        names = [row.name for row in chosen]
        cost = max(row.cost for row in chosen)
        sizes: dict[str, int | str] = {"sites": len(names), "FLOPs": f"{cost:.0%}", "images": images, "latents": side}
        found.append(
            Case(
                f"stream {title}",
                sizes,
                lambda names=names: streamed(model, x0, names, batch_size),
                lambda names=names: stored(model, x0, names, batch_size),
                agree,
                memory_goal=1 / 0.15,
            )
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure statistics of activations over a data set.")
    parser.add_argument("--small", action="store_true", help="a tiny network; checks agreement only")
    parser.add_argument("--channels", type=int, default=96, help="width of the first level; 320 is SD 1.5")
    parser.add_argument("--side", type=int, default=32, help="side of the latents")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="timed pairs per case")
    options = parser.parse_args()
    found = cases(
        small=options.small,
        channels=options.channels,
        side=options.side,
        images=options.images,
        batch_size=options.batch_size,
    )
    return run_cases(found, smoke=options.small, repeats=options.repeats)


if __name__ == "__main__":
    sys.exit(main())
