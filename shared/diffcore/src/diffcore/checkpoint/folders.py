"""Model folders of diffusers, read and checked: a whole pipeline, or one backbone."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffcore.checkpoint.catalog import BACKBONES, IGNORED_COMPONENTS, PIPELINES, current_class
from diffcore.checkpoint.component import read_component, role_of
from diffcore.checkpoint.configcheck import refuse_code
from diffcore.checkpoint.inventory import Component, Inventory
from diffcore.checkpoint.refusal import about, custom_code, refusal
from diffcore.checkpoint.walk import walk
from diffcore.errors import IncompatibleModelError, printable
from diffcore.io.strictjson import read_untrusted

_COMPONENT = re.compile(r"[a-z][a-z0-9_]{0,63}")
_EDM_NUMBERS = ("sigma_data", "sigma_min", "sigma_max", "rho")


def inspect_pipeline(
    path: Path, sizes: Mapping[str, int], *, allow_pickle: bool = False, config_only: bool = False
) -> Inventory:
    """Checks a folder with a `model_index.json` and returns its content; see `inspect_model`."""
    index_path = path / "model_index.json"
    index = read_untrusted(index_path)
    class_name = index.get("_class_name")
    if not isinstance(class_name, str):
        raise custom_code(path, sizes, index_path, f"_class_name {class_name}")
    if class_name not in PIPELINES:
        if any(name.endswith(".py") for name in sizes):
            raise custom_code(path, sizes, index_path, class_name)
        raise refusal(
            index_path,
            f"is of class {printable(class_name)}, which is not supported; supported: {', '.join(PIPELINES)}",
        )
    with about(index_path):
        refuse_code(index)
    components, settings = {}, {}
    for name, value in index.items():
        if name in IGNORED_COMPONENTS or name.startswith("_"):
            continue
        if not _COMPONENT.fullmatch(name):
            raise refusal(index_path, f"has the component {printable(name)!r}, which is no plain name")
        if value is None or isinstance(value, bool | int | float | str):
            settings[name] = value
            continue
        found = _library_and_class(path, sizes, index_path, name, value)
        if found is None:
            continue
        if name not in PIPELINES[class_name]:
            raise refusal(index_path, f"has the component {printable(name)}, unknown to {class_name}")
        component = _component(path, sizes, name, *found, allow_pickle=allow_pickle, config_only=config_only)
        if component is not None:
            components[name] = component
    if not any(component.role == "backbone" for component in components.values()):
        raise refusal(index_path, "names no backbone")
    codec = components.get("vae")
    if codec is not None and codec.config.get("latents_mean") and class_name != "StableDiffusionXLPipeline":
        raise refusal(codec.folder, f"sets latents_mean, which {class_name} ignores; remove it, or the class is wrong")
    return Inventory(path, "pipeline", class_name, components, settings=settings)


def inspect_configs(path: Path) -> Inventory:
    """Returns the configurations and vocabularies of a pipeline folder; its weights are not looked for."""
    if not (path / "model_index.json").is_file():
        raise refusal(path, "has no model_index.json; point to a pipeline folder")
    return inspect_pipeline(path, walk(path), config_only=True)


def inspect_backbone(path: Path, sizes: Mapping[str, int], *, allow_pickle: bool = False) -> Inventory:
    """Checks a folder with the `config.json` of a backbone and returns its content; see `inspect_model`."""
    config_path = path / "config.json"
    config = read_untrusted(config_path)
    own = config.get("_class_name", "")
    if not isinstance(own, str):
        raise custom_code(path, sizes, config_path, f"_class_name {own}")
    class_name = current_class(own, config)
    if class_name not in BACKBONES:
        with about(config_path):
            refuse_code(config)
        if own and role_of("diffusers", own) is None and any(name.endswith(".py") for name in sizes):
            raise custom_code(path, sizes, config_path, own)
        what = f"is of class {printable(own)}" if own else "names no class of diffusers"
        raise refusal(config_path, f"{what}, and no backbone; point to a pipeline or backbone folder")
    inside = {name: size for name, size in sizes.items() if "/" not in name}
    components = {"backbone": read_component(path, inside, "backbone", "diffusers", own, allow_pickle=allow_pickle)}
    scheduler = _scheduler_beside(path, inside)
    if scheduler is not None:
        components["scheduler"] = scheduler
    settings = _edm_settings(path / "denoiser.json") if "denoiser.json" in inside else {}
    return Inventory(path, "component", class_name, components, settings=settings)


def _library_and_class(
    path: Path, sizes: Mapping[str, int], index_path: Path, name: str, value: Any
) -> tuple[str, str] | None:
    if not (isinstance(value, list) and len(value) == 2):
        raise refusal(index_path, f"has {printable(value)} for component {name}, not a library and a class")
    library, class_name = value
    if library is None and class_name is None:
        return None
    if not (isinstance(library, str) and isinstance(class_name, str)) or library not in ("diffusers", "transformers"):
        raise custom_code(path, sizes, index_path, f"{library}.{class_name} for {name}")
    if role_of(library, class_name) is None:
        what = f"names {library}.{printable(class_name)} for {name}, which is not supported"
        raise refusal(index_path, f"{what}; save the pipeline with another {name}")
    return library, class_name


def _component(
    path: Path, sizes: Mapping[str, int], name: str, library: str, class_name: str, **options: bool
) -> Component | None:
    """Reads one component; None where an optional one has no files."""
    inside = {file.removeprefix(f"{name}/"): size for file, size in sizes.items() if file.startswith(f"{name}/")}
    if not inside and role_of(library, class_name) != "backbone":
        return None
    if not inside:
        raise refusal(path / name, "is missing")
    return read_component(path / name, inside, name, library, class_name, **options)


def _scheduler_beside(path: Path, inside: Mapping[str, int]) -> Component | None:
    """Returns the scheduler in a backbone's folder, or in the folder `scheduler` next to it."""
    folder = path if "scheduler_config.json" in inside else path.absolute().parent / "scheduler"
    config_path = folder / "scheduler_config.json"
    if not config_path.is_file():
        return None
    class_name = read_untrusted(config_path, infinite=True).get("_class_name")
    if not isinstance(class_name, str) or role_of("diffusers", class_name) != "scheduler":
        raise refusal(config_path, f"is of class {printable(class_name)}, which is no scheduler we know")
    return read_component(folder, {config_path.name: 0}, "scheduler", "diffusers", class_name)


def _edm_settings(path: Path) -> dict[str, Any]:
    """Returns the settings of EDM preconditioning, from diffcore's own `denoiser.json` beside the configuration."""
    settings = read_untrusted(path)
    unknown = sorted(settings.keys() - {"prediction_type", *_EDM_NUMBERS})
    if unknown or settings.get("prediction_type") != "edm":
        what = f"sets {printable(unknown[0])}" if unknown else "has another prediction_type than edm"
        raise refusal(path, f"{what}; it takes prediction_type edm, {', '.join(_EDM_NUMBERS)}")
    for name in _EDM_NUMBERS:
        value = settings.get(name, 1.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
            raise IncompatibleModelError(
                f"{printable(path, 300)} sets {name} to {printable(value)}; give a positive number"
            )
    return settings
