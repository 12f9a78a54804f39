"""The schedule and prediction type of a model, read from its configurations alone."""

from collections.abc import Mapping
from typing import Any

from diffcore.checkpoint.inventory import Component, Inventory
from diffcore.checkpoint.stated import require_agreement
from diffcore.checkpoint.stored import stored_in
from diffcore.denoiser import NoiseSchedule, PredictionType
from diffcore.errors import printable
from diffcore.models import singlefile
from diffcore.models.assemble import read_schedule


def schedule_of(
    inventory: Inventory, prediction_type: PredictionType | None = None
) -> tuple[PredictionType | None, NoiseSchedule | None, str | None]:
    """Returns the prediction type and schedule of a model, and the place that states the prediction type.

    Args:
        inventory: The checked content of a folder or file, as `inspect_model` returns it.
        prediction_type: Prediction type that replaces the one in the files.

    Returns:
        (None, None, None) for pickled single files, whose family only loading tells.
    """
    known_from = None
    if inventory.header is not None:
        stored = stored_in([inventory.header], inventory.path)
        metadata = inventory.header.metadata
        inventory, known_from = singlefile.described_plan(stored, metadata, inventory.class_name, None, prediction_type)
    else:
        require_agreement(inventory, prediction_type=prediction_type)
    backbone = next((c for c in inventory.components.values() if c.role == "backbone"), None)
    if backbone is None:
        return None, None, None
    scheduler = next((c for c in inventory.components.values() if c.role == "scheduler"), None)
    stated, schedule = read_schedule(backbone.class_name, scheduler, inventory.settings)
    if prediction_type is not None:
        return prediction_type, schedule, "`prediction_type`"
    return stated, schedule, known_from or _source(backbone, scheduler, inventory.settings)


def _source(backbone: Component, scheduler: Component | None, settings: Mapping[str, Any]) -> str:
    """Returns the place, in words, that states the prediction type of a folder."""
    if settings.get("prediction_type") == "edm":
        return "denoiser.json"
    if scheduler is None:
        return f"what is usual for {backbone.class_name}"
    if "prediction_type" in scheduler.config:
        return f"prediction_type in {printable(scheduler.folder.name)}/scheduler_config.json"
    return f"{scheduler.class_name}, which predicts it where nothing is said"
