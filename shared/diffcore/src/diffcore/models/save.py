"""Writing models to folders that appear only when complete, and backbones without a pipeline."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffcore.checkpoint.origin import forget_origins
from diffcore.denoiser import DiscreteSchedule
from diffcore.denoiser.library import built
from diffcore.errors import UserError, printable
from diffcore.io import files
from diffcore.io.jsonfile import write_json

if TYPE_CHECKING:
    from diffcore.models.model import DiffusionModel


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder and renames it to `folder` at the end; a failure leaves nothing behind.

    Args:
        folder: Place of the new folder; nothing may be there yet.

    Raises:
        UserError: Something is there already, or the place is not writable.
        MachineError: The disk is full or failing.
    """
    if folder.exists() or folder.is_symlink():
        raise UserError(f"{printable(folder, 300)} is there already; choose another folder")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    with files.explained(folder):
        try:
            files.make_folder(partial)
            yield partial
            forget_origins(partial)
            for path in partial.rglob("*"):
                if path.is_file():
                    with path.open("rb") as file:
                        files.sync(file.fileno())
            files.replace(partial, folder)
            files.sync_folder(folder.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_backbone(model: "DiffusionModel", folder: Path) -> None:
    """Writes a backbone and, beside its weights, the settings of its noise schedule."""
    backbone: Any = model.backbone
    backbone.save_pretrained(folder)
    scheduler, schedule = model.scheduler, model.denoiser.schedule
    if scheduler is None and model.denoiser.prediction_type == "edm":
        numbers = {name: getattr(schedule, name) for name in ("sigma_min", "sigma_max", "rho", "sigma_data")}
        write_json(folder / "denoiser.json", {"prediction_type": "edm", **numbers})
    elif scheduler is None and isinstance(schedule, DiscreteSchedule):
        scheduler = built("DDIMScheduler", _ddim(schedule, model.denoiser.prediction_type))
    if scheduler is not None:
        scheduler.save_pretrained(folder)


def _ddim(schedule: DiscreteSchedule, prediction_type: str) -> dict[str, Any]:
    """Returns the settings of a scheduler for a model that came without one."""
    return {
        "num_train_timesteps": schedule.num_timesteps,
        "beta_schedule": schedule.betas,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "steps_offset": schedule.steps_offset,
        "set_alpha_to_one": schedule.set_alpha_to_one,
        "clip_sample": False,
        "prediction_type": prediction_type,
    }
