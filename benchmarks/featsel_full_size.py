"""Features at the full size of Stable Diffusion 1.5, with random weights, on one thread of the CPU.

    python benchmarks/featsel_full_size.py [--part shares inventory sweep] [--image-size 512] [--smoke]

`shares`: the share of a forward pass's time that early exit leaves, beside the share of its floating point operations
that the inventory states; the autoencoder stands apart. `inventory`: CPU seconds of listing SDXL and Flux from their
configurations. `sweep`: points matched with twenty activations, from cached latents in one pass that stops early,
against the way of the published code, which encodes and runs the whole network for each activation and compares
512x512 places; each runs once. At 512 pixels the sweep takes about an hour. Parts that did not run keep their figures.
`--smoke` has narrow layers and writes nothing.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from diffcore.bench import peak_megabytes
from diffcore.io.jsonfile import read_json, write_json
from diffcore.models import DiffusionModel, from_pipeline
from diffcore.testing import real_configs, tiny
from diffusion_featsel.app.bench import sweep
from diffusion_featsel.forward import activations_of
from diffusion_featsel.inventory import Inventory, inventory, inventory_of_config
from diffusion_featsel.presets import preset

RESULTS = Path(__file__).parent / "results" / "featsel-full-size.json"
CONFIGS = Path(real_configs.__file__).parent
NARROW: dict[str, Any] = {"block_out_channels": (32, 64, 128, 128)}
FEATURES = {
    "a feature of the second down level": ["down-level1-repeat1-res-out"],
    "the coarse query of the third up level": ["up-level1-repeat1-vit-block0-cross-q"],
    "the coarse residual output": ["up-level1-repeat2-res-out"],
    "sd15/practical": list(preset("sd15/practical").selection.names),
}
GOALS = {"sweep": 15.0, "sweep memory": 10.0, "inventory": 5.0}

Row = tuple[str, float, str]
T = TypeVar("T")


def config(model: str, part: str) -> dict[str, Any]:
    """Returns a published configuration."""
    return json.loads((CONFIGS / model / part / "config.json").read_text())


def random_model(*, smoke: bool) -> DiffusionModel:
    """Returns a model of the published configuration, or a narrow one, with an untrained text encoder of one layer."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    unet, vae, text = (config("sd15", part) for part in ("unet", "vae", "text_encoder"))
    if smoke:
        unet, vae = unet | NARROW, vae | NARROW
    text |= {"num_hidden_layers": 1, "vocab_size": 514}
    parts = {
        "unet": tiny.seeded(lambda: cast(Any, diffusers.UNet2DConditionModel).from_config(unet), 0),
        "vae": tiny.seeded(lambda: cast(Any, diffusers.AutoencoderKL).from_config(vae), 0),
        "text_encoder": tiny.seeded(lambda: CLIPTextModel(CLIPTextConfig(**text)), 0),
        "tokenizer": tiny.tokenizer(),
        "scheduler": diffusers.DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False
        ),
        "safety_checker": None,
        "feature_extractor": None,
    }
    for part in ("unet", "vae", "text_encoder"):
        parts[part].eval().requires_grad_(requires_grad=False)
    pipe = cast(Any, diffusers.StableDiffusionPipeline)(**parts, requires_safety_checker=False)
    return from_pipeline(pipe, name="random Stable Diffusion 1.5")


def timed(function: Callable[[], T]) -> tuple[T, float]:
    """Returns what a function returns, and its seconds of CPU time."""
    start = time.process_time()
    result = function()
    return result, time.process_time() - start


def best(function: Callable[[], object], repeats: int) -> float:
    """Returns the fewest seconds of CPU time of several runs."""
    return min(timed(function)[1] for _ in range(repeats))


def shares(model: DiffusionModel, listed: Inventory, size: int, repeats: int) -> list[Row]:
    """Returns the time of early exits and of the autoencoder, as shares of one whole forward pass with one row."""
    x_t, condition = torch.randn(1, *model.shape[:1], *listed.size), model.empty_condition(1)

    def whole() -> torch.Tensor:
        with torch.no_grad():
            return model.denoiser(x_t, torch.full((1,), 50.0), condition).output

    with torch.no_grad():
        whole()
        full = best(whole, repeats)
        encoding = best(lambda: model.codec.encode(torch.rand(1, 3, size, size)), repeats)
    rows = [
        (f"whole network at {size} pixels", full, "s"),
        (f"autoencoder at {size} pixels, share of the network's time", encoding / full, "share"),
    ]
    for name, activations in FEATURES.items():
        chosen = listed.named(activations)
        seconds = best(lambda chosen=chosen: activations_of(model, x_t, 50.0, condition, chosen), repeats)
        rows.append((f"{name} at {size} pixels, share of time", seconds / full, "share"))
        rows.append((f"{name} at {size} pixels, share of FLOPs", max(row.cost for row in chosen), "share"))
    return rows


def inventories() -> list[Row]:
    """Returns the CPU seconds of listing two large networks from their configurations."""
    _, importing = timed(lambda: inventory_of_config(config("sd15", "unet") | NARROW))
    rows: list[Row] = [("imports, and the inventory of a narrow network", importing, "s")]
    for name, part in (("sdxl", "unet"), ("flux-dev", "transformer")):
        found, seconds = timed(lambda name=name, part=part: inventory_of_config(config(name, part)))
        rows += [(f"inventory of {name}", seconds, "s"), (f"activations of {name}", float(len(found)), "activations")]
    return rows


def sweeps(model: DiffusionModel, listed: Inventory, size: int, *, smoke: bool) -> list[Row]:
    """Returns ratios of time and of peak memory between the published way and ours, on two images."""
    images = torch.nn.functional.interpolate(
        torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), (size, size), mode="bilinear"
    )
    case = sweep(model, listed, images, 3 if smoke else 20, 64 if smoke else 512)
    results: list[Any] = []
    seconds, peaks = [], []
    for function in (case.ours, case.reference):

        def once(function: Callable[[], Any] = function) -> None:
            result, taken = timed(function)
            results.append(result)
            seconds.append(taken)

        peaks.append(peak_megabytes(once))
    label = f"{case.sizes['activations']} activations of 2 images at {size} pixels"
    return [
        (f"{label}, same matches", float(case.agree(*results)), "bool"),
        (f"{label}, ours", seconds[0], "s"),
        (f"{label}, the published way", seconds[1], "s"),
        (f"{label}, ratio of time", seconds[1] / seconds[0], "x"),
        (f"{label}, ratio of peak memory", peaks[1] / peaks[0], "x"),
        (f"{label}, peak memory of ours", peaks[0], "MB"),
        (f"{label}, peak memory of the published way", peaks[1], "MB"),
    ]


def write(rows: list[Row]) -> None:
    """Writes figures beside those of other parts and sizes, as rows and as a table."""
    old = {row["name"]: row for row in read_json(RESULTS)} if RESULTS.exists() else {}
    new = {name: {"name": name, "value": value, "unit": unit} for name, value, unit in rows}
    merged = list((old | new).values())
    write_json(RESULTS, merged)
    lines = [f"| {row['name']} | {row['value']:.4g} | {row['unit']} |" for row in merged]
    text = "\n".join(["| figure | value | unit |", "|---|---|---|", *lines])
    goals = f"Goals: a sweep {GOALS['sweep']:g}x as fast with a tenth of the memory; an inventory within 5 s of CPU."
    RESULTS.with_suffix(".md").write_text(
        "# Features at the full size of Stable Diffusion 1.5\n\n"
        "Random weights, float32, one thread of a CPU; seconds are CPU time. Written by\n"
        f"`benchmarks/featsel_full_size.py`. {goals}\n\n{text}\n"
    )


def main() -> int:
    """Prints and writes the figures; 1 if matches differ, or a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("shares", "inventory", "sweep")
    parser.add_argument("--part", nargs="+", choices=parts, default=parts)
    parser.add_argument("--image-size", type=int, default=512, help="side of the square images")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each pass whose shares are taken")
    parser.add_argument("--smoke", action="store_true", help="narrow layers, three activations")
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = 64 if options.smoke else options.image_size
    rows: list[Row] = []
    if "inventory" in options.part:
        rows += inventories()
    if {"shares", "sweep"} & set(options.part):
        model = random_model(smoke=options.smoke)
        listed = inventory(model, size=(size // 8, size // 8))
        if "shares" in options.part:
            rows += shares(model, listed, size, 1 if options.smoke else options.repeats)
        if "sweep" in options.part:
            rows += sweeps(model, listed, size, smoke=options.smoke)
    for name, value, unit in rows:
        sys.stdout.write(f"{name}: {value:.4g} {unit}\n")
    if not options.smoke:
        write(rows)
    wrong = [name for name, value, unit in rows if unit == "bool" and not value]
    slow = [
        name
        for name, value, _ in rows
        if (name.startswith("inventory of") and value > GOALS["inventory"])
        or ("ratio of time" in name and value < GOALS["sweep"])
        or ("ratio of peak memory" in name and value < GOALS["sweep memory"])
    ]
    sys.stdout.writelines(f"MISSED: {name}\n" for name in slow)
    return int(bool(wrong or (slow and not options.smoke)))


if __name__ == "__main__":
    sys.exit(main())
