"""The call that loads a model folder with diffusers alone, with the arguments it needs."""

from diffcore.checkpoint.inventory import Component, Inventory

_HALVES = {"F16": "torch.float16", "BF16": "torch.bfloat16"}


def plain_call(inventory: Inventory, place: str) -> str | None:
    """Returns the line of Python that loads a folder with diffusers alone; None for single files.

    diffusers widens half precision to float32 unless told otherwise, transformers does not: a folder whose text
    encoders are stored in half precision runs only if the precision is named. Variants are found only by their name.

    Args:
        inventory: The checked content of the folder.
        place: The path that the call names.
    """
    if inventory.layout not in ("pipeline", "component"):
        return None
    stored = [component for component in inventory.components.values() if component.weights]
    variant = next((component.variant for component in stored if component.variant), None)
    halves = [_half(component) for component in stored if component.role == "text_encoder"]
    arguments = [f'"{place}"']
    if variant is not None:
        arguments.append(f'variant="{variant}"')
    if half := next(filter(None, halves), None):
        arguments.append(f"torch_dtype={half}")
    return f"{inventory.class_name}.from_pretrained({', '.join(arguments)})"


def _half(component: Component) -> str | None:
    types = [entry.dtype for header in component.weights for entry in header.tensors.values()]
    return next((_HALVES[kind] for kind in types if kind in _HALVES), None)
