"""How the cost of a space grows with its members, at SD 1.5's size, up to a forecast for the paper's 65 000.

    python benchmarks/w2w_scale.py [--smoke]

Members are random adapters of 99 648 numbers in a population on disk, with planted directions that they share. Each
size is built in a process of its own: 100 components in the canonical gauge, from shards on disk, through the table of
inner products. Seconds are of CPU time on one thread; memory is the largest anonymous memory of the process (what it
allocated, without mapped files) above what it held before. An exponent is the slope of log cost over log members by
least squares.

The streamed way, which holds no table, is run on a tenth of the paper's population. Its cost is in proportion to the
members for the same number of components, so that ten times the tenth is the forecast for all; the forecast from the
smaller sizes by its own exponent is shown beside the measured tenth. `--smoke` takes tiny sizes and writes nothing.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from diffcore.io.jsonfile import write_json
from w2w_space.app.bench import sd15_layout
from w2w_space.files.base import base_of_layout
from w2w_space.files.population import SHARD_ROWS, Member, PopulationFolder
from w2w_space.layout import Layout
from w2w_space.space import WeightSpace

RESULTS = Path(__file__).parent / "results" / "w2w-scale.json"
SIZES, STREAMED, TENTH, PAPER = (250, 500, 1000, 2000, 4000), (800, 1600, 3200), 6500, 65_000
COMPONENTS, PLANTED = 100, 120


def write_population(folder: Path, layout: Layout, members: int) -> None:
    """Writes random members that share planted directions of falling strength.

    Args:
        folder: Place of the population.
        layout: Table of the vectors.
        members: Number of members.
    """
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(PLANTED, layout.size, generator=generator)
    strengths = torch.linspace(1.0, 0.2, PLANTED)
    centre = torch.randn(layout.size, generator=generator)
    found = PopulationFolder.create(folder, layout, base_of_layout(layout))
    for start in range(0, members, SHARD_ROWS):
        count = min(SHARD_ROWS, members - start)
        latents = torch.randn(count, PLANTED, generator=generator) * strengths
        block = torch.randn(count, layout.size, generator=generator).mul_(0.5).addmm_(latents, directions)
        found = found.append(block.mul_(0.1).add_(centre), [Member(f"m{start + i:05}") for i in range(count)])


def cost(folder: Path, members: int, solver: str, components: int) -> dict[str, float]:
    """Returns CPU seconds and anonymous memory in MB of one space of the first members of a population.

    Args:
        folder: Place of the population.
        members: Number of members that are taken.
        solver: Way to the components.
        components: Number of components.
    """
    torch.set_num_threads(1)
    whole = PopulationFolder.open(folder)
    whole = PopulationFolder(folder, whole.facts, whole.members[:members])
    population = whole.population()
    before, done = anonymous(), threading.Event()
    peak = [before]

    def watch() -> None:
        while not done.wait(0.02):  # memory sends no event: it is looked at
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start, wall = time.process_time(), time.perf_counter()
    space = WeightSpace.build(population, num_components=components, solver=solver)  # pyright: ignore[reportArgumentType]
    seconds, elapsed = time.process_time() - start, time.perf_counter() - wall
    done.set()
    watcher.join()
    return {
        "seconds": seconds,
        "elapsed": elapsed,
        "megabytes": peak[0] - before,
        "first": float(space.variances[0]),
        "last": float(space.variances[-1]),
    }


def anonymous() -> float:
    """Returns the anonymous memory of this process in MB (10^6 bytes)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError("this system does not tell the anonymous memory of a process; run the script on Linux")


def apart(folder: Path, members: int, solver: str, components: int) -> dict[str, float]:
    """Returns what `cost` measures in a new process, on one thread.

    Args:
        folder: Place of the population.
        members: Number of members that are taken.
        solver: Way to the components.
        components: Number of components.
    """
    words = [sys.executable, __file__, "--one", str(folder), str(members), solver, str(components)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{solver:>10} {members:6} members: {found['seconds']:8.1f} s, {found['megabytes']:7.0f} MB", flush=True)
    return found


def exponent(sizes: tuple[int, ...], values: list[float]) -> float:
    """Returns the slope of log values over log sizes."""
    x, y = (torch.tensor(part, dtype=torch.float64).log() for part in (sizes, values))
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (x @ x))


def main() -> int:
    """Prints and writes costs, exponents and forecast."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, and nothing is written")
    parser.add_argument("--one", nargs=4, metavar=("FOLDER", "MEMBERS", "SOLVER", "COMPONENTS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        folder, members, solver, components = options.one
        print(json.dumps(cost(Path(folder), int(members), solver, int(components))))
        return 0
    sizes, streamed, tenth, components = SIZES, STREAMED, TENTH, COMPONENTS
    layout = sd15_layout()
    if options.smoke:
        sizes, streamed, tenth, components = (40, 80), (40, 80), 120, 5
        layout = Layout.of({"a.to_q": (40, 32), "b.to_v": (24, 32)}, rank=1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "population"
        write_population(folder, layout, tenth)
        table = {n: apart(folder, n, "gram", components) for n in sizes}
        without = {n: apart(folder, n, "iterative", components) for n in (*streamed, tenth)}
    told: dict[str, object] = {"numbers": layout.size, "components": components}
    lines = ["| way | members | CPU seconds | anonymous MB | variance of the first and last component |"]
    lines += ["|---|---|---|---|---|"]
    for solver, found in (("table", table), ("streamed", without)):
        for n, row in found.items():
            lines.append(
                f"| {solver} | {n} | {row['seconds']:.1f} | {row['megabytes']:.0f} | "
                f"{row['first']:.1f}, {row['last']:.2f} |"
            )
        told[solver] = {str(n): row for n, row in found.items()}
    slopes = {
        "table, seconds": exponent(sizes, [table[n]["seconds"] for n in sizes]),
        "table, megabytes": exponent(sizes, [table[n]["megabytes"] for n in sizes]),
        "streamed, seconds": exponent(streamed, [without[n]["seconds"] for n in streamed]),
    }
    largest = streamed[-1]
    ahead = without[largest]["seconds"] * (tenth / largest) ** slopes["streamed, seconds"]
    whole = without[tenth]["seconds"] * (PAPER / tenth) ** max(slopes["streamed, seconds"], 1.0)
    told |= {"exponents": slopes, "forecast_of_tenth": ahead, "forecast_of_all": whole}
    lines += ["", *(f"* exponent of {name}: {value:.2f}" for name, value in slopes.items())]
    lines += [
        f"* forecast for {tenth} members from {streamed[0]} to {largest}: {ahead:.0f} s; measured: "
        f"{without[tenth]['seconds']:.0f} s",
        f"* forecast for {PAPER} members: {whole / 60:.0f} minutes of one thread, and "
        f"{PAPER * layout.size * 4 / 1e9:.0f} GB on disk, read eight times",
    ]
    print("\n".join(lines))
    if not options.smoke:
        write_json(RESULTS, told)
        RESULTS.with_suffix(".md").write_text(
            "# How the cost of a space grows with its members\n\n"
            "Written by `benchmarks/w2w_scale.py`: adapters of 99 648 numbers in shards on disk, 100 components in\n"
            "the canonical gauge, one thread.\n\n" + "\n".join(lines) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
