"""The commands that write checkpoints: export, restore."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffcore.cli import Flag, Job, Output, emit
from diffcore.errors import UserError, printable
from nemo_localize.app.inputs import digest_of_neurons
from nemo_localize.app.options import MostFrequent, UnchangedModel
from nemo_localize.app.work import FOUND_BEFORE

if TYPE_CHECKING:
    from torch import nn

    from diffcore.run import Run, RunMap


def export(
    model: UnchangedModel,
    neurons: Path,
    *,
    most_frequent: MostFrequent = None,
    lora: bool = True,
    download: Flag = False,
    output: Output = Output(),
) -> int:
    """Write the model with neurons ablated in its weights: a checkpoint, what undoes it, and the edit as a LoRA.

    Shortest form: nemo-localize export MODEL RUN

    RUN/model loads in any tool. RUN/delta.safetensors holds the removed rows; keep it private.

    Args:
        neurons: Run of localize or audit, results.jsonl, an object of module names and channels as JSON, or a table of
            the published code.
        lora: Write the edit as LoRA in three layouts too.
        download: Fetch a repository owner/name.
    """
    from diffcore.models import resolve
    from diffcore.run import input_hash
    from nemo_localize.files.export import checkpoint_in, how_to_load, manifest_in
    from nemo_localize.files.export import export as write_edit
    from nemo_localize.files.neurons import most_frequent as find_most_frequent
    from nemo_localize.files.neurons import read_neurons

    source = resolve(model, download=download)
    # A table lists channels by the number of their layer; the model tells which layer that is.
    backbone = _backbone(source) if neurons.suffix == ".csv" else None
    chosen, reasons = read_neurons(neurons, backbone=backbone)
    if most_frequent is not None:
        chosen = find_most_frequent(reasons, most_frequent)
        reasons = {caption: own.minus(own.minus(chosen)) for caption, own in reasons.items()}

    def compute(run: "Run", map: "RunMap") -> dict[str, Any]:
        if checkpoint_in(run.folder) is None:
            write_edit(source, chosen, run.folder, reasons=reasons, lora=lora)
        manifest = manifest_in(run.folder)
        return {key: manifest[key] for key in ("num_neurons", "files", "left_out", "lora")}

    folder = output.out or Path("runs") / f"export-{source.stem}"
    config = {"model": model, "neurons": neurons, "most_frequent": most_frequent, "lora": lora}
    inputs = {source.name: input_hash(source), "neurons": digest_of_neurons(chosen, reasons)}
    job = Job("nemo-localize export", folder, output, config, inputs, ("model", *FOUND_BEFORE))
    code = job(compute, plan={"neurons": len(chosen), "layers": len(chosen.layers)})
    if not output.dry_run:
        print(how_to_load(folder) or f"checkpoint: {checkpoint_in(folder)}", file=sys.stderr)
    return code


def _backbone(source: Path) -> "nn.Module | None":
    """Returns the network of a model; None where its files can be edited but not loaded."""
    from diffcore.models import load
    from diffcore.runtime import Runtime

    try:
        return load(source, Runtime(device="cpu")).backbone
    except UserError:
        return None


def restore(edit: Path, *, out: Path, json: Flag = False) -> int:
    """Write the checkpoint as it was before export, byte for byte.

    Shortest form: nemo-localize restore RUN --out FOLDER

    Args:
        edit: Run folder of export or audit, with its delta.
        out: Folder or file of the restored checkpoint; nothing may be there.
        json: Print the result as one JSON object.
    """
    from nemo_localize.files.export import DELTA, checkpoint_in
    from nemo_localize.files.export import restore as write_restored

    checkpoint = checkpoint_in(edit)
    if checkpoint is None:
        raise UserError(f"{printable(edit, 300)} holds no edited model; give a finished run of export or audit")
    emit({"restored": out, "sha256": write_restored(checkpoint, edit / DELTA, out)}, json)
    return 0
