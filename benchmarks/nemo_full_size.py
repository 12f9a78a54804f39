"""Statistics and one noise difference at the full size of Stable Diffusion 1.5, with random weights.

    python benchmarks/nemo_full_size.py [--captions 1000] [--seeds 10] [--device cpu] [--smoke]

What is shown: the seven value layers and their 5760 neurons are found in the published structure (860 M parameters,
3.4 GB in float32), and what reference statistics and a caption's first step cost there. Weights are random, and the
tokenizer is one of single bytes; neither changes what it costs. `--smoke` has narrow layers and writes nothing.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from diffcore.io.jsonfile import write_json
from diffcore.models import DiffusionModel
from diffcore.testing import real_configs, tiny
from nemo_localize import FirstStep, StepSettings, collect_statistics
from nemo_localize.detect import look
from nemo_localize.planted import assembled, ordinary_captions
from nemo_localize.sites import value_sites

RESULTS = Path(__file__).parent / "results" / "nemo-full-size.json"
NARROW: dict[str, Any] = {"block_out_channels": (32, 64, 128, 128), "sample_size": 16}

T = TypeVar("T")


def random_model(device: str, *, smoke: bool) -> DiffusionModel:
    """Returns a model of the published configuration, or a narrow one."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = Path(real_configs.__file__).parent / "sd15"
    unet, text = (json.loads((folder / part / "config.json").read_text()) for part in ("unet", "text_encoder"))
    unet |= NARROW if smoke else {}
    text |= {"num_hidden_layers": 1, "vocab_size": 514} if smoke else {}
    modules = {
        "unet": tiny.seeded(lambda: cast(Any, UNet2DConditionModel).from_config(unet), 0).to(device),
        "text_encoder": tiny.seeded(lambda: CLIPTextModel(CLIPTextConfig(**text)), 0).to(device),
        "tokenizer": tiny.tokenizer(),
    }
    return assembled("random Stable Diffusion 1.5", modules)


def timed(function: Callable[[], T]) -> tuple[T, float]:
    """Returns what a function returns, and its seconds."""
    start = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def main() -> int:
    """Prints and writes the figures; 1 if the structure is another than published, or a value is not finite."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=int, default=1000, help="of the statistics")
    parser.add_argument("--seeds", type=int, default=10, help="rows of the noise difference")
    parser.add_argument("--batch-size", type=int, default=10, help="rows per pass")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="narrow layers, 4 captions, 2 seeds")
    options = parser.parse_args()
    num_captions, num_seeds = (4, 2) if options.smoke else (options.captions, options.seeds)
    torch.set_num_threads(1)
    model, building = timed(lambda: random_model(options.device, smoke=options.smoke))
    sites = value_sites(model.backbone)
    statistics, collecting = timed(lambda: collect_statistics(model, ordinary_captions(num_captions)))
    step = FirstStep(model, StepSettings(num_seeds=num_seeds), batch_size=options.batch_size)
    cond, _, _ = step.encode(["a caption"])
    base, stepping = timed(lambda: look(step, cond))
    figures = [
        ("value layers", len(sites.sites), "layers"),
        ("neurons", sites.num_neurons, "neurons"),
        ("model built", building, "s"),
        (f"statistics of {num_captions} captions", collecting, "s"),
        (f"statistics of {num_captions} captions, each", collecting / max(num_captions, 1), "s"),
        (f"noise difference of {num_seeds} seeds", stepping, "s"),
        (f"noise difference of {num_seeds} seeds, each", stepping / num_seeds, "s"),
        ("consistency of a caption that was never learnt", max(base.consistency[0]), "MS-SSIM"),
        ("peak memory of the process", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000, "MB"),
    ]
    for name, value, unit in figures:
        sys.stdout.write(f"{name}: {value:.4g} {unit}\n")
    if not options.smoke:
        rows = [{"name": f"{name} {options.device}", "value": value, "unit": unit} for name, value, unit in figures]
        write_json(RESULTS, rows)
    expected = (7, 576 if options.smoke else 5760)
    sound = not base.errors and not statistics.dead.any() and statistics.num_prompts == num_captions
    return int((len(sites.sites), sites.num_neurons) != expected or not sound)


if __name__ == "__main__":
    sys.exit(main())
