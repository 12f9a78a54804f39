"""Adapters that LyCORIS itself writes: a LoRA gives its outputs, LoHa and LoKr become LoRAs, DoRA is refused by name.

Needs `lycoris-lora`, which stays out of the workspace: `make integrations` runs this in an environment of its own.
"""

from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from lycoris import LycorisNetwork, create_lycoris  # pyright: ignore[reportMissingImports]

from diffcore.adapters import Base, read_adapter
from diffcore.errors import IncompatibleModelError
from diffcore.models import from_pipeline
from diffcore.testing import tiny
from w2w_space.files.importing import import_adapters
from w2w_space.files.materialise import materialise

SETTINGS: dict[str, dict[str, Any]] = {
    "LoRA": {"algo": "lora"},
    "LoHa": {"algo": "loha"},
    "LoKr": {"algo": "lokr", "factor": 4},
    "LoKr, whole": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "full": {"algo": "full"},
    "DoRA": {"algo": "lora", "dora_wd": True},
}
# Biases are no change of a weight, and DoRA needs the weight that it changes.
REFUSED = {"full": "a full difference of weights", "DoRA": "DoRA"}


def output(network: torch.nn.Module) -> torch.Tensor:
    """Returns the network's output for fixed inputs."""
    x, t, cond = tiny.inputs("sd15")
    with torch.no_grad():
        return network(x, t, **cond).sample


def refusal_of(read: Callable[..., Any], path: Path, base: Base) -> str:
    """Returns the reason for which a file is refused; empty where it is read."""
    try:
        read(path, base)
    except IncompatibleModelError as error:
        return str(error)
    return ""


def main() -> None:
    """Writes one adapter of each kind, reads it, and compares outputs; ends with an error where they differ."""
    LycorisNetwork.apply_preset({"target_module": ["Transformer2DModel"]})
    base, folder = from_pipeline(tiny.pipeline("sd15")).adapter_base, Path(mkdtemp())
    before = output(tiny.pipeline("sd15").unet)
    for number, (name, settings) in enumerate(SETTINGS.items()):
        unet = tiny.pipeline("sd15").unet
        net = create_lycoris(unet, 1.0, linear_dim=4, linear_alpha=2.0, **settings)
        net.apply_to()
        g = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=g) * 0.05)
        theirs, path = output(unet), folder / f"{name}.safetensors"
        net.save_weights(str(path), torch.float32, {})
        effect = float((theirs - before).abs().max())
        if name in REFUSED:
            for read in (read_adapter, lambda path, base: materialise(path, base, 4)):
                if REFUSED[name] not in (reason := refusal_of(read, path, base)):
                    raise AssertionError(reason)
            print(f"{name}: refused by name")
            continue
        if name == "LoRA":
            adapter = read_adapter(path, base)
        else:
            if "not supported" not in (reason := refusal_of(read_adapter, path, base)):
                raise AssertionError(reason)
            adapter, losses = materialise(path, base, 64)
            assert max(loss.relative for loss in losses.values()) < 1e-5, name
        ours = output(from_pipeline(tiny.pipeline("sd15")).with_adapter(adapter).backbone)
        error = float((ours - theirs).abs().max())
        print(f"{name}: {len(adapter.modules)} modules, effect {effect:.3g}, error {error:.2g}")
        assert effect > 1e-3, name
        assert error < 1e-4 * effect + 1e-5, name
    paths = sorted(folder.glob("*.safetensors"))
    found = import_adapters(folder / "pop", paths, base, rank=4, materialise=True, largest_loss=1.0)
    assert sorted(found.names) == sorted(name for name in SETTINGS if name not in REFUSED), found.names
    print("losses at rank 4:", {m.name: round(m.loss, 3) for m in found.members})


if __name__ == "__main__":
    main()
