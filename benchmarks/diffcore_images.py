"""What one reading of the images saves: all metrics of two folders beside a pass for each of four metrics.

    python benchmarks/diffcore_images.py [--small] [--repeats 3]

The reference decodes and embeds both folders anew for each of Fréchet distance (with floor and limit), kernel distance,
precision / recall / density / coverage, and share of copies, as separate tools do, in the same batches of the same
network: fixed random weights. The numbers themselves come from the same functions on both sides. Ours also writes its
features to the disk, so that it could go on after an interruption.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffcore.bench import Case, run_cases
from diffcore.data import list_images, load_images
from diffcore.metrics import (
    FeatureExtractor,
    Reading,
    compare_images,
    extrapolate,
    frechet_estimate,
    kernel_distance,
    nearest_training_images,
    precision_recall,
    real_floor,
)
from diffcore.metrics.copies import looks_like_noise, noise_of
from diffcore.metrics.random_network import PREPROCESSING, RandomNetwork
from diffcore.run import Run, input_hash

Numbers = dict[str, float]
_BATCH = 32


def write_images(folder: Path, count: int, side: int, *, bright: int, seed: int) -> Path:
    """Writes smooth blotches as PNG files."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for number in range(count):
        blotches = generator.integers(0, 200, (4, 4, 3), dtype=np.uint8) + np.uint8(bright)
        picture = Image.fromarray(blotches).resize((side, side), Image.Resampling.BICUBIC)
        picture.save(folder / f"{number:05d}.png")
    return folder


def folders_case(count: int, side: int) -> Case:
    """All metrics of two folders in one reading beside four."""
    place = tempfile.TemporaryDirectory()
    real = write_images(Path(place.name) / "real", count, side, bright=0, seed=0)
    fake = write_images(Path(place.name) / "fake", count, side, bright=20, seed=1)
    network = RandomNetwork(0)
    # Named like a network made to find copies, so that their share is counted: a fourth metric.
    extractor = FeatureExtractor("sscd:random", network.sha256(), PREPROCESSING, network, lambda net, x: net(x))
    digests = {"real": input_hash(real), "fake": input_hash(fake)}
    reading = Reading(torch.device("cpu"), _BATCH)

    def ours() -> Numbers:
        with (
            tempfile.TemporaryDirectory(dir=place.name) as folder,
            Run.open(Path(folder) / "run", command="bench", config={}, inputs=digests) as run,
        ):
            found = compare_images(list_images(real), list_images(fake), [extractor], run, reading, digests=digests)
        return {measure.metric: measure.value for measure in found.measures}

    def embedded(folder: Path) -> Tensor:
        images = load_images(folder, threads=1).unit()
        return torch.cat([extractor(batch) for batch in images.split(_BATCH)])

    def four_passes() -> Numbers:
        numbers: Numbers = {}
        for measure in (_distances, _kernel, _balls):
            numbers |= measure(embedded(real), embedded(fake))
        return numbers | _copies(embedded(real), embedded(fake), extractor)

    def agree(a: Numbers, b: Numbers) -> bool:
        return a.keys() == b.keys() and all(abs(a[name] - b[name]) <= 1e-4 * abs(b[name]) + 1e-9 for name in a)

    sizes: dict[str, int | str] = {"images": f"2x{count}", "side": side}
    return Case("metrics of two folders", sizes, ours, four_passes, agree, goal=2.5)


def _distances(real: Tensor, fake: Tensor) -> Numbers:
    return {
        "Fréchet distance": frechet_estimate(real, fake).value,
        "Fréchet distance, extrapolated": extrapolate(real, fake).value,
        "Fréchet distance, real against real": real_floor(real, len(fake)).value,
    }


def _kernel(real: Tensor, fake: Tensor) -> Numbers:
    return {"kernel distance": kernel_distance(real, fake).value}


def _balls(real: Tensor, fake: Tensor) -> Numbers:
    return {name: float(value) for name, value in precision_recall(real, fake)._asdict().items()}


def _copies(real: Tensor, fake: Tensor, extractor: FeatureExtractor) -> Numbers:
    cosine, noise = nearest_training_images(real, fake).cosine[:, 0], noise_of(extractor)
    broken = torch.zeros_like(cosine, dtype=torch.bool) if noise is None else looks_like_noise(fake, noise)
    copies = (cosine > 0.5) & ~broken
    return {
        "share of copies": float(copies.double().mean()),
        "share that looks like noise": float(broken.double().mean()),
    }


def cases(*, small: bool = False) -> list[Case]:
    """Returns the case; its images lie in a temporary folder that goes when the case does."""
    return [folders_case(40, 16) if small else folders_case(2000, 64)]


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure one reading of two image folders beside four.")
    parser.add_argument("--small", action="store_true", help="few images; checks agreement only")
    parser.add_argument("--repeats", type=int, default=3, help="timed pairs")
    options = parser.parse_args()
    return run_cases(cases(small=options.small), smoke=options.small, repeats=options.repeats)


if __name__ == "__main__":
    sys.exit(main())
