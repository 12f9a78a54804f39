"""The commands that write checkpoints: apply, revert."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from diffcore.cli import Flag, Output, emit
from diffcore.errors import UserError, printable
from nemo_localize.app.inputs import digest_of
from nemo_localize.app.options import MostFrequent, UnchangedModel
from nemo_localize.app.work import FOUND_BEFORE

if TYPE_CHECKING:
    from torch import nn


def apply(
    model: UnchangedModel,
    neurons: Path,
    *,
    most_frequent: MostFrequent = None,
    lora: bool = True,
    download: Flag = False,
    output: Output = Output(),
) -> int:
    """Write the model with neurons switched off for good: a checkpoint, what undoes it, and the edit as a LoRA.

    Shortest form: nemo-localize apply MODEL RUN

    RUN/model loads in any tool. RUN/delta.safetensors holds the removed rows; keep it to yourself.

    Args:
        neurons: Run of localize or audit, results.jsonl, an object of module names and channels as JSON, or a table of
            the published code.
        lora: Write the edit as LoRA in three layouts too.
        download: Fetch a repository owner/name.
    """
    from diffcore.models import resolve
    from diffcore.run import Run, input_hash
    from nemo_localize.files.export import apply as write_edit
    from nemo_localize.files.export import checkpoint_in, how_to_load, manifest_in
    from nemo_localize.files.neurons import most_frequent as find_most_frequent
    from nemo_localize.files.neurons import read_neurons

    source = resolve(model, download=download)
    # A table lists channels by the number of their layer: which layer that is, the model knows.
    backbone = _backbone(source) if neurons.suffix == ".csv" else None
    chosen, reasons = read_neurons(neurons, backbone=backbone)
    if most_frequent is not None:
        chosen = find_most_frequent(reasons, most_frequent)
        reasons = {caption: own.minus(own.minus(chosen)) for caption, own in reasons.items()}
    folder = output.out or Path("runs") / f"apply-{source.stem}"
    if output.dry_run:
        emit({"neurons": len(chosen), "layers": len(chosen.layers), "writes": folder / "model"}, output.json)
        return 0
    with Run.open(
        folder,
        command="nemo-localize apply",
        config={"model": model, "neurons": neurons, "most_frequent": most_frequent, "lora": lora},
        inputs={source.name: input_hash(source), "neurons": digest_of(chosen, reasons)},
        restart=output.restart,
        volatile=("model", *FOUND_BEFORE),
    ) as run:
        if not run.finished:
            if checkpoint_in(folder) is None:
                write_edit(source, chosen, folder, reasons=reasons, lora=lora)
            manifest = manifest_in(folder)
            run.finish({key: manifest[key] for key in ("num_neurons", "files", "left_out", "lora")})
        emit(run.result, output.json)
    print(how_to_load(folder) or f"checkpoint: {checkpoint_in(folder)}", file=sys.stderr)
    return 0


def _backbone(source: Path) -> "nn.Module | None":
    """Returns the network of a model; None of what can be edited, but not loaded whole."""
    from diffcore.models import load
    from diffcore.runtime import Runtime

    try:
        return load(source, Runtime(device="cpu")).backbone
    except UserError:
        return None


def revert(edit: Path, *, out: Path, json: Flag = False) -> int:
    """Write the checkpoint as it was before apply, byte for byte.

    Shortest form: nemo-localize revert RUN --out FOLDER

    Args:
        edit: Run folder of apply or audit, with its delta.
        out: Where the restored checkpoint goes; nothing may be there.
        json: Print the result as one JSON object.
    """
    from nemo_localize.files.export import DELTA, checkpoint_in
    from nemo_localize.files.export import revert as restore

    checkpoint = checkpoint_in(edit)
    if checkpoint is None:
        raise UserError(f"{printable(edit, 300)} holds no edited model; give a finished run of apply or audit")
    emit({"restored": out, "sha256": restore(checkpoint, edit / DELTA, out)}, json)
    return 0
