"""Paths that hold no loadable model: sockets, devices, links that lead elsewhere, files of other families."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffcore.testing.malformed.case import WEIGHTS, Bases, Case, copied
from diffcore.testing.sockets import make_socket

_UNET = "model.diffusion_model."


def place_cases() -> Iterator[Case]:
    """Yields tricks of the file system, and single files that are not one of the families."""
    for name, trick in _tricks():
        yield Case(f"folder: {name}", "place", lambda b, f, t=trick: _tricked(b, f, t))
    for name, make in _paths():
        yield Case(f"path: {name}", "place", make)
    for name, change in _strangers():
        yield Case(f"file: {name}", "place", lambda b, f, c=change: _restated(b, f, c))
    for name, keys in foreign_layouts().items():
        yield Case(f"layout: {name}", "place", lambda b, f, k=keys: _of_keys(f, k))


def _tricked(bases: Bases, folder: Path, trick: Callable[[Path], None]) -> Path:
    model = copied(bases.backbone, folder)
    trick(model)
    return model


def _tricks() -> Iterator[tuple[str, Callable[[Path], None]]]:
    def linked(name: str, target: str) -> Callable[[Path], None]:
        def trick(model: Path) -> None:
            (model / name).unlink(missing_ok=True)
            (model / name).symlink_to(target)

        return trick

    def socket(name: str) -> Callable[[Path], None]:
        def trick(model: Path) -> None:
            (model / name).unlink(missing_ok=True)
            make_socket(model / name)

        return trick

    def foldered(name: str) -> Callable[[Path], None]:
        def trick(model: Path) -> None:
            (model / name).unlink()
            (model / name).mkdir()

        return trick

    yield "a socket beside the weights", socket("s")
    yield "a socket for the configuration", socket("config.json")
    yield "a socket for the weights", socket(WEIGHTS)
    yield "a broken link", linked("x", "nowhere")
    yield "a link to itself", linked("x", "x")
    yield "a link to the folder above", linked("x", "..")
    yield "a link to a folder", _linked_folder
    yield "weights linked to a device", linked(WEIGHTS, os.devnull)
    yield "configuration linked to a device", linked("config.json", os.devnull)
    yield "weights linked to nothing", linked(WEIGHTS, "nowhere")
    yield "nine levels", lambda model: (model / "/".join("abcdefghi")).mkdir(parents=True)
    yield "10 001 files", _crowded
    yield "a folder for the configuration", foldered("config.json")
    yield "a folder for the weights", foldered(WEIGHTS)
    yield "no configuration", lambda model: (model / "config.json").unlink()
    yield "no weights", lambda model: (model / WEIGHTS).unlink()
    yield "two unknown variants", _variants


def _linked_folder(model: Path) -> None:
    (model / "folder").mkdir()
    (model / "x").symlink_to("folder")


def _crowded(model: Path) -> None:
    (model / "many").mkdir()
    (model / "many" / "0").touch()
    for index in range(1, 10_001):
        os.link(model / "many" / "0", model / "many" / str(index))


def _variants(model: Path) -> None:
    for variant in ("one", "two"):
        os.link(model / WEIGHTS, model / f"diffusion_pytorch_model.{variant}.safetensors")
    (model / WEIGHTS).unlink()


def _paths() -> Iterator[tuple[str, Callable[[Bases, Path], Path | str]]]:
    def socket(bases: Bases, folder: Path) -> Path:
        make_socket(folder / "model.safetensors")
        return folder / "model.safetensors"

    def adapter(bases: Bases, folder: Path) -> Path:
        (folder / "adapter_config.json").write_text("{}")
        return folder

    def autoencoder(bases: Bases, folder: Path) -> Path:
        return bases.pipeline / "vae"

    def text_encoder(bases: Bases, folder: Path) -> Path:
        return bases.pipeline / "text_encoder"

    def image(bases: Bases, folder: Path) -> Path:
        (folder / "model.png").write_bytes(b"\x89PNG")
        return folder / "model.png"

    yield "an empty folder", lambda b, f: f
    yield "nothing there", lambda b, f: f / "absent"
    yield "a name of the hub", lambda b, f: "stranger/missing"
    yield "a name of the zoo", lambda b, f: "zoo:missing"
    yield "with NUL", lambda b, f: "a\0b"
    yield "with controls", lambda b, f: f"{f}/\x1b[31m\n\u202e"
    yield "a device", lambda b, f: os.devnull
    yield "a socket", socket
    yield "an adapter folder", adapter
    yield "an autoencoder", autoencoder
    yield "a text encoder", text_encoder
    yield "an image", image


def _restated(bases: Bases, folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    tensors = load_file(bases.single)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors"


def _strangers() -> Iterator[tuple[str, Callable[[dict[str, Tensor]], None]]]:
    def with_extra(name: str) -> Callable[[dict[str, Tensor]], None]:
        return lambda tensors: tensors.update({name: torch.ones(2)})

    def bare(tensors: dict[str, Tensor]) -> None:
        unet = {name.removeprefix(_UNET): t for name, t in tensors.items() if name.startswith(_UNET)}
        del unet["out.2.bias"]
        tensors.clear()
        tensors.update(unet)

    def without_one(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{_UNET}out.2.bias"]

    yield "a backbone tensor missing", without_one
    yield "a backbone tensor too many", with_extra(f"{_UNET}extra.weight")
    yield "a tensor of no component", with_extra("extra.weight")
    yield "a bare backbone with one missing", bare
    yield "nine input channels", lambda t: t.update({f"{_UNET}input_blocks.0.0.weight": torch.ones(32, 9, 3, 3)})


def foreign_layouts() -> dict[str, dict[str, tuple[int, ...]]]:
    """Returns tensor names and shapes of single files that cannot be loaded, by kind of file."""
    first = {f"{_UNET}input_blocks.0.0.weight": (8, 4, 3, 3)}
    return {
        "SDXL refiner": {"conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias": (4,)},
        "SDXL refiner, backbone alone": first | {f"{_UNET}label_emb.0.0.weight": (2, 2560)},
        "SD3": {f"{_UNET}joint_blocks.0.context_block.adaLN_modulation.1.bias": (4,)},
        "Flux": {"double_blocks.0.img_attn.norm.key_norm.scale": (4,)},
        "diffusers' names": {"down_blocks.0.resnets.0.conv1.weight": (4,)},
        "LoRA of kohya": {"lora_unet_a.lora_down.weight": (2, 4), "lora_unet_a.alpha": (1,)},
        "LoRA of diffusers": {"unet.a.lora.down.weight": (2, 4)},
        "unknown": {"x": (1,), "y": (2,)},
        "unknown width": first | {f"{_UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (4, 512)},
    }


def _of_keys(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    return folder / "model.safetensors"
