"""The edit in all its forms at the full size of Stable Diffusion 1.5, with random weights.

    python benchmarks/nemo_full_size_edit.py FOLDER

Hooks against edited weights in float64; the written folder, as plain diffusers loads it, and the LoRA against them in
float32; and what `restore` writes against the bytes of the source. FOLDER takes some 11 GB, and is emptied at the end.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from diffcore.io.files import sha256
from diffcore.io.jsonfile import write_json
from diffcore.models import DiffusionModel
from diffcore.testing import real_configs, tiny
from nemo_localize import NeuronSet, export, restore
from nemo_localize.ablate import ablated, ablated_copy
from nemo_localize.files.export import LORA, checkpoint_in
from nemo_localize.planted import assembled
from nemo_localize.sites import value_sites

RESULTS = Path(__file__).parent / "results" / "nemo-full-size-edit.json"
WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"


def random_model(dtype: torch.dtype) -> DiffusionModel:
    """Returns a U-Net of the published configuration, with the text side of the tiny model."""
    config = json.loads((Path(real_configs.__file__).parent / "sd15" / "unet" / "config.json").read_text())
    unet = tiny.seeded(lambda: cast(Any, UNet2DConditionModel).from_config(config), 0).to(dtype).eval()
    parts = tiny.pipeline("sd15").components
    modules = {"unet": unet, "text_encoder": parts["text_encoder"], "tokenizer": parts["tokenizer"]}
    return assembled("random Stable Diffusion 1.5", modules)


@torch.no_grad()
def output(unet: Any) -> Tensor:
    """Returns what a U-Net makes of fixed latents of 16x16 and fixed text states."""
    generator = torch.Generator().manual_seed(0)
    x_t, states = torch.randn(1, 4, 16, 16, generator=generator), torch.randn(1, 77, 768, generator=generator)
    return unet(x_t.to(unet.dtype), 981, encoder_hidden_states=states.to(unet.dtype)).sample


def main() -> int:
    """Prints and writes the differences; 1 if one is larger than it may be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new folder on a disk with room")
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True)
    model = random_model(torch.float64)
    sites = value_sites(model.backbone)
    neurons = NeuronSet.of({site.module: [1, width - 1] for site, width in zip(sites.sites, sites.widths, strict=True)})
    plain = output(model.backbone)
    with ablated(model.backbone, neurons):
        hooked = output(model.backbone)
    figures = {
        "effect of the edit": float((hooked - plain).abs().max()),
        "hooks - rows, float64": float((hooked - output(ablated_copy(model, neurons).backbone)).abs().max()),
    }
    del plain, hooked
    cast(Any, model.backbone).float()

    pipeline = tiny.pipeline("sd15")
    pipeline.unet = model.backbone
    pipeline.save_pretrained(folder / "source")
    export(folder / "source", neurons, folder / "out")
    written = checkpoint_in(folder / "out")
    assert written is not None
    wanted = output(ablated_copy(model, neurons).backbone)
    loaded = UNet2DConditionModel.from_pretrained(written, subfolder="unet", local_files_only=True)
    figures["folder by plain diffusers - rows, float32"] = float((output(loaded) - wanted).abs().max())
    del loaded
    for lora in sorted((folder / "out" / LORA).iterdir()):
        difference = (output(model.with_adapter(lora).backbone) - wanted).abs().max()
        figures[f"{LORA}/{lora.name} - rows, float32"] = float(difference)
    restore(written, folder / "out" / "delta.safetensors", folder / "restored")
    same = sha256(folder / "restored" / WEIGHTS) == sha256(folder / "source" / WEIGHTS)
    figures["bytes restored"] = float(same)
    for name, value in figures.items():
        sys.stdout.write(f"{name}: {value:.3g}\n")
    write_json(RESULTS, [{"name": name, "value": value, "unit": ""} for name, value in figures.items()])
    shutil.rmtree(folder)
    close = all(value <= (1e-12 if "float64" in name else 1e-5) for name, value in figures.items() if " - " in name)
    return int(not (close and same and figures["effect of the edit"] > 1e-4))


if __name__ == "__main__":
    sys.exit(main())
