"""How the cost of `score` grows with images, activations and resolution, on a small U-Net with random weights.

    python benchmarks/featsel_scaling.py [--repeats 2] [--smoke]

One size grows at a time, the others stay. An exponent is the slope of log seconds over log size by least squares:
1 for cost in proportion, less where a fixed part remains. Resolution counts the image's pixels, so that 1 is linear in
them. Peak memory is fitted in the same way. `--smoke` takes two small sizes of each and writes nothing.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from diffcore.bench import peak_megabytes
from diffcore.io.jsonfile import write_json
from diffcore.testing import tiny
from diffusion_featsel import inventory, score

RESULTS = Path(__file__).parent / "results" / "featsel-scaling.json"
IMAGES, ACTIVATIONS, SIDES = (16, 24, 32, 48), (8, 16, 24, 32), (16, 24, 32, 48)
FIXED_IMAGES, FIXED_SIDE = 16, 16


def cost(num_images: int, num_activations: int | None, side: int, repeats: int) -> tuple[float, float]:
    """Returns seconds of CPU time and peak memory in MB of one ranking.

    Args:
        num_images: Number of random images.
        num_activations: Number of activations, evenly over the network; None for all.
        side: Rows and columns of an image.
        repeats: Number of runs, of which the fastest counts.
    """
    model = tiny.model("sd15")
    condition = {"encoder_hidden_states": torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1))}
    images = torch.rand(num_images, 3, side, side, generator=torch.Generator().manual_seed(0))
    factor = 16 // model.shape[-1]
    features = inventory(model, size=(side // factor, side // factor)).features
    count = num_activations or len(features)
    chosen = [features[place * len(features) // count] for place in range(count)]

    def run() -> None:
        score(model, images, chosen, condition=condition)

    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return min(seconds), peak_megabytes(run)


def exponent(sizes: Sequence[int], values: Sequence[float]) -> float:
    """Returns the slope of log values over log sizes."""
    x, y = (torch.tensor(part, dtype=torch.float64).log() for part in (sizes, values))
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x @ x))


def main() -> int:
    """Prints and writes the costs and the fitted exponents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2, help="runs of each size, of which the fastest counts")
    parser.add_argument("--smoke", action="store_true", help="two sizes of each")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cost(16, 4, 16, 1)  # imports, and whatever is made once
    kept = 2 if options.smoke else 4
    repeats = 1 if options.smoke else options.repeats
    studies = {
        "images": (IMAGES, lambda size: cost(size, None, FIXED_SIDE, repeats)),
        "activations": (ACTIVATIONS, lambda size: cost(FIXED_IMAGES, size, FIXED_SIDE, repeats)),
        "pixels": (tuple(side**2 for side in SIDES), lambda size: cost(FIXED_IMAGES, 16, round(size**0.5), repeats)),
    }
    rows: list[dict[str, object]] = []
    lines: list[str] = []
    for name, (sizes, measure) in studies.items():
        sizes = sizes[:kept]
        seconds, megabytes = zip(*(measure(size) for size in sizes), strict=True)
        exponents = exponent(sizes, seconds), exponent(sizes, megabytes)
        for size, taken, peak in zip(sizes, seconds, megabytes, strict=True):
            lines.append(f"| {size} {name} | {taken:.3g} | {peak:.3g} |")
            rows += [
                {"name": f"{size} {name} seconds", "value": taken, "unit": "s"},
                {"name": f"{size} {name} memory", "value": peak, "unit": "MB"},
            ]
        lines.append(f"| **exponent of {name}** | **{exponents[0]:.2f}** | **{exponents[1]:.2f}** |")
        rows += [
            {"name": f"exponent of {name}, seconds", "value": exponents[0], "unit": "exponent"},
            {"name": f"exponent of {name}, memory", "value": exponents[1], "unit": "exponent"},
        ]
    text = "\n".join(["| size | seconds of CPU | peak memory, MB |", "|---|---|---|", *lines])
    sys.stdout.write(text + "\n")
    if not options.smoke:
        write_json(RESULTS, rows)
        RESULTS.with_suffix(".md").write_text(
            "# How the cost of a ranking grows\n\n"
            "Written by `benchmarks/featsel_scaling.py`: a small U-Net with random weights, one thread, the fastest\n"
            f"of {repeats} runs. {FIXED_IMAGES} images of {FIXED_SIDE} x {FIXED_SIDE} pixels where these are not\n"
            "varied; all activations where images are varied, 16 where pixels are. Exponents are slopes of\n"
            "logarithms: 1 is cost in\n"
            f"proportion.\n\n{text}\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
