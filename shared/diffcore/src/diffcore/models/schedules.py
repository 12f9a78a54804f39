"""The schedule and prediction type of a model, read from its configurations alone."""

from dataclasses import replace

from diffcore.denoiser import NoiseSchedule, PredictionType
from diffcore.models import singlefile
from diffcore.models.assemble import read_schedule
from diffcore.models.inventory import Inventory
from diffcore.models.stored import stored_in


def schedule_of(
    inventory: Inventory, prediction_type: PredictionType | None = None
) -> tuple[PredictionType | None, NoiseSchedule | None]:
    """Returns what the backbone predicts and under which schedule.

    Args:
        inventory: Of the gate.
        prediction_type: Replaces what the files say.

    Returns:
        (None, None) for pickled single files, whose family only loading tells.
    """
    if inventory.header is not None:
        stored = stored_in([inventory.header], inventory.path)
        plan = singlefile.plan_of(inventory.class_name, None)
        stated = prediction_type or singlefile.described_prediction(stored)
        usual = plan.components["scheduler"].config.get("prediction_type", "epsilon")
        plan = singlefile.with_prediction(plan, stated or usual, zero_snr="ztsnr" in stored.shapes)
        inventory = replace(plan, header=None)
    backbone = next((c for c in inventory.components.values() if c.role == "backbone"), None)
    if backbone is None:
        return None, None
    scheduler = next((c for c in inventory.components.values() if c.role == "scheduler"), None)
    stated_type, schedule = read_schedule(backbone.class_name, scheduler, inventory.settings)
    return prediction_type or stated_type, schedule
