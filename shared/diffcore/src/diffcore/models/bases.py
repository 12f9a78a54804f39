"""The weights of a model that adapters can change: linear and convolutional ones, by name, without loading them."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from torch import nn

from diffcore.adapters import AdapterFile, Base
from diffcore.adapters.fusing import CHANGEABLE
from diffcore.adapters.keys import BACKBONE
from diffcore.adapters.read import place
from diffcore.checkpoint import ldm
from diffcore.checkpoint.families import PREFIX
from diffcore.checkpoint.folders import inspect_configs
from diffcore.checkpoint.inspect import inspect_model
from diffcore.checkpoint.inventory import Component
from diffcore.errors import IncompatibleModelError, printable
from diffcore.models.build import factory_of, on_meta
from diffcore.models.singlefile import CONFIGS

FAMILIES = ("sd15", "sd21", "sdxl")
"""Families whose names are known without any file of theirs."""


def base_of(name: str, modules: Mapping[str, nn.Module], backbone: nn.Module) -> Base:
    """Returns the base of built networks, on any device.

    Args:
        name: The model's name in error messages.
        modules: Networks of the pipeline by name; its text encoders are looked at.
        backbone: The U-Net or transformer itself.
    """
    shapes = {BACKBONE: _shapes(backbone)}
    shapes |= {n: _shapes(m) for n, m in modules.items() if n.startswith("text_encoder") and isinstance(m, nn.Module)}
    kind = "unet" if type(backbone).__name__.startswith("UNet") else "transformer"
    original = _original(shapes[BACKBONE]) if type(backbone).__name__ == "UNet2DConditionModel" else {}
    return Base(name, kind, shapes, original)


@cache
def family_base(family: str) -> Base:
    """Returns the base of one of `FAMILIES`, built at its real size on the meta device."""
    return _planned(family, inspect_configs(CONFIGS / family).components)


def families_of(found: AdapterFile) -> list[Base]:
    """Returns the bases of `FAMILIES` in which every tensor of an adapter has its place."""
    bases = [family_base(family) for family in FAMILIES]
    return [base for base in bases if misfit(found, base) is None]


def misfit(found: AdapterFile, base: Base) -> str | None:
    """Returns the reason why an adapter does not fit a model; None if it fits."""
    try:
        place(found, base)
    except IncompatibleModelError as error:
        return str(error)
    return None


def base_for(found: AdapterFile, model: Path | None) -> Base:
    """Returns the model that the user names for an adapter, or else a family that it fits.

    Raises:
        IncompatibleModelError: It fits no family that is known without a model.
        UserError: As `inspect_model`.
    """
    if model is not None:
        return base_on_disk(model)
    if not (fitting := families_of(found)):
        raise IncompatibleModelError(
            f"{printable(found.path, 300)} fits none of {', '.join(FAMILIES)}; name its base model with `model`"
        )
    return fitting[0]  # where several fit, they agree on the names


def base_on_disk(path: Path) -> Base:
    """Returns the base of a model on disk after checking it, without loading a weight.

    Raises:
        UserError: As `inspect_model`.
    """
    inventory = inspect_model(path)
    if inventory.header is not None:
        return family_base(inventory.class_name)
    return _planned(path.resolve().name, inventory.components)


def _planned(name: str, components: Mapping[str, Component]) -> Base:
    wanted = {n: c for n, c in components.items() if c.role in ("backbone", "text_encoder")}
    modules = {n: on_meta(component, factory_of(component)) for n, component in wanted.items()}
    backbone = next(modules[n] for n, component in wanted.items() if component.role == "backbone")
    return base_of(name, modules, backbone)


def _shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {n: tuple(m.weight.shape) for n, m in network.named_modules() if isinstance(m, CHANGEABLE)}


def _original(modules: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    pieces = ldm.unet_names([f"{name}.weight" for name in modules])
    return {
        name: pieces[f"{name}.weight"].name.removeprefix(PREFIX).removesuffix(".weight")
        for name in modules
        if pieces[f"{name}.weight"].name.startswith(PREFIX)
    }
