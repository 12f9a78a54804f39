"""The edit as an exact LoRA, in the layouts that other tools read."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from diffcore.adapters import Adapter, write_adapter
from diffcore.checkpoint.stored import stored_in
from diffcore.errors import IncompatibleModelError, UserError
from diffcore.io.tensorfile import TensorHeader
from diffcore.models.bases import base_on_disk
from nemo_localize.files.stored_rows import tensor_name
from nemo_localize.neurons import NeuronSet


def adapter_of(weights: Mapping[str, Tensor], neurons: NeuronSet, *, name: str = "nemo-localize") -> Adapter:
    """Returns the edit as an exact LoRA: one rank per neuron of a layer; at strength 1 it equals the edited weights.

    Args:
        weights: Weight matrices of the layers, by module name.
        neurons: Neurons that the LoRA ablates.
        name: Name of the adapter in messages.

    Raises:
        UserError: All these rows are zero already.
    """
    differences = {}
    for module, channels in neurons.layers:
        difference = torch.zeros_like(weights[module])
        difference[list(channels)] = -weights[module][list(channels)]
        differences[module] = difference
    if not any(bool(difference.any()) for difference in differences.values()):
        raise UserError("the rows of these neurons are 0 in this model already; there is nothing to write")
    return Adapter.from_differences(differences, name=name)


def write_loras(source: Path, headers: Mapping[str, TensorHeader], neurons: NeuronSet, folder: Path) -> None:
    """Writes the edit as LoRA for diffusers, kohya and PEFT.

    Args:
        source: Folder or file of the model.
        headers: Headers of the files that hold its backbone, by name.
        neurons: Neurons that the LoRAs ablate.
        folder: Folder of the LoRAs; older ones in it are replaced.

    Raises:
        IncompatibleModelError: A layer has a bias, which no LoRA changes.
    """
    weights: dict[str, Tensor] = {}
    for header in headers.values():
        names = {found: module for module, _ in neurons.layers if (found := tensor_name(header, module, "weight"))}
        for name, tensor in stored_in([header], header.path).read(names):
            known = weights.get(names[name])
            if known is None or tensor.element_size() > known.element_size():  # of copies, the most exact one
                weights[names[name]] = tensor
        if biased := next((module for module, _ in neurons.layers if tensor_name(header, module, "bias")), None):
            raise IncompatibleModelError(
                f"{biased!r} has a bias, which no LoRA changes; leave the LoRA out with `lora=False`"
            )
    adapter, base = adapter_of(weights, neurons), base_on_disk(source)
    write_adapter(adapter, folder / "diffusers.safetensors", format="diffusers", base=base, overwrite=True)
    write_adapter(adapter, folder / "kohya.safetensors", format="kohya", base=base, overwrite=True)
    write_adapter(adapter, folder / "peft", format="peft", base=base, overwrite=True)
