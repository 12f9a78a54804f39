"""Plans for single-file checkpoints: which configurations belong to the family, which tensors to which component."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from diffcore.errors import IncompatibleModelError, printable
from diffcore.models import ldm
from diffcore.models.families import PREFIX
from diffcore.models.folders import inspect_configs
from diffcore.models.inventory import Inventory
from diffcore.models.stored import Stored
from diffcore.strictjson import StrictError, read_limited

CONFIGS = Path(__file__).parent / "configs"
PADS = {"sd15": ("<|endoftext|>",), "sd21": ("!",), "sdxl": ("<|endoftext|>", "!")}
"""What each family's tokenizers pad with."""

_PARAMETERIZATION = re.compile(r"^\s*parameterization:\s*[\"']?(v|eps)[\"']?\s*$", re.MULTILINE)


def plan_of(family: str, like: Path | None) -> Inventory:
    """Returns the configurations of a family: those shipped here, or those of a pipeline folder that the user names.

    Raises:
        IncompatibleModelError: The folder is of another family.
    """
    plan = inspect_configs(CONFIGS / family if like is None else like)
    wanted = "StableDiffusionXLPipeline" if family == "sdxl" else "StableDiffusionPipeline"
    if plan.class_name != wanted:
        raise IncompatibleModelError(
            f"{printable(like, 300)} is of class {plan.class_name}, the file needs {wanted}; name another folder"
        )
    return plan


def parts_of(stored: Stored, family: str) -> dict[str, Stored]:
    """Returns the tensors of each component that the file holds, by the component's name in the pipeline.

    Raises:
        IncompatibleModelError: Some tensors belong to no component.
    """
    bare = not any(name.startswith(PREFIX) for name in stored.shapes)
    prefixes = {"unet": "" if bare else PREFIX, "vae": "first_stage_model."}
    prefixes |= {part: prefix for (of, part), (_, prefix) in ldm.TEXT_PREFIXES.items() if of == family}
    unused = _unused(family)
    kept = [name for name in stored.shapes if not unused(name)]
    if bare:
        return {"unet": stored.restricted(kept)}
    parts = {part: [n for n in kept if n.startswith(prefix)] for part, prefix in prefixes.items()}
    strangers = [name for name in kept if not name.startswith(tuple(prefixes.values()))]
    if strangers:
        raise IncompatibleModelError(
            f"{printable(stored.where, 300)} holds {len(strangers)} tensors that belong to no component, such as "
            f"{printable(strangers[0])!r}; get a clean copy of the model"
        )
    return {part: stored.restricted(names) for part, names in parts.items() if names}


def described_prediction(stored: Stored) -> Literal["epsilon", "v_prediction"] | None:
    """Returns the prediction type from marker tensors, or from a NAME.yaml beside the file; None without either."""
    if "v_pred" in stored.shapes:
        return "v_prediction"
    beside = stored.where.with_suffix(".yaml")
    if not beside.is_file():
        return None
    try:
        text = read_limited(beside, 1_000_000).decode("utf-8", errors="replace")
    except StrictError as error:
        raise IncompatibleModelError(f"{printable(beside, 300)} {error}; delete it") from None
    found = _PARAMETERIZATION.search(text)
    if found is None:
        return None
    return "v_prediction" if found[1] == "v" else "epsilon"


def with_prediction(plan: Inventory, prediction_type: str, *, zero_snr: bool) -> Inventory:
    """Returns a plan whose scheduler says what the backbone predicts, and whether its last level is pure noise."""
    scheduler = plan.components["scheduler"]
    config: dict[str, Any] = {**scheduler.config, "prediction_type": prediction_type}
    if zero_snr:
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return replace(plan, components={**plan.components, "scheduler": replace(scheduler, config=config)})


def _unused(family: str) -> Callable[[str], bool]:
    # OpenCLIP-H is stored whole; SD 2.x stops before its last layer.
    last_layer = "cond_stage_model.model.transformer.resblocks.23." if family == "sd21" else None
    return lambda name: bool(ldm.HARMLESS.fullmatch(name)) or (last_layer is not None and name.startswith(last_layer))
