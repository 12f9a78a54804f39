"""Building modules from configurations and stored tensors.

A module is built on the meta device, names and shapes are compared, and only then are weights allocated, filled, and
checked to be complete and finite.
"""

import inspect
import math
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffcore.checkpoint.inventory import Component
from diffcore.checkpoint.pieces import Naming, Piece, Shape
from diffcore.checkpoint.stored import Stored
from diffcore.errors import IncompatibleModelError, MissingDependencyError, printable

MAX_BUFFER_BYTES = 2**28  # of position tables and the like, which no file holds


def build(
    component: Component,
    stored: Stored,
    naming: Naming,
    *,
    dtype: torch.dtype,
    device: torch.device,
    leftovers: re.Pattern[str],
    check_finite: bool = True,
) -> nn.Module:
    """Returns a component's module with its stored weights, frozen and in `eval()`.

    Args:
        component: A backbone, codec or text encoder.
        stored: The component's tensors in its files.
        naming: Finds the stored tensor of each tensor of the module.
        dtype: Precision of the floating point weights.
        device: The device that the module is placed on.
        leftovers: Names of stored tensors that may be left over.
        check_finite: Whether every number is checked for NaN and infinity.

    Raises:
        IncompatibleModelError: The configuration does not build, or names, shapes or values of the weights are wrong.
    """
    factory = factory_of(component)
    skeleton = on_meta(component, factory)
    wanted = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict(keep_vars=True).items()}
    pieces = naming(wanted.keys(), stored.shapes.keys())
    shared = _shared_names(skeleton)
    _compare(component, stored, wanted, pieces, shared, skeleton, leftovers)
    module = _with_real_buffers(factory)
    state = _read(component, stored, pieces, wanted, dtype, device, skeleton, check_finite)
    for name, twin in shared.items():
        if name not in state and twin in state:
            state[name] = state[twin]
    module.load_state_dict(state, strict=False, assign=True)
    for buffer_name, buffer in list(module.named_buffers()):
        if buffer_name not in state:
            module.get_submodule(buffer_name.rpartition(".")[0]).register_buffer(
                buffer_name.rpartition(".")[2], buffer.to(device), persistent=False
            )
    empty = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    if empty:
        raise _refusal(component, stored, f"leaves {len(empty)} tensors empty; first: {printable(empty[0])}")
    return module.eval().requires_grad_(False)


def factory_of(component: Component) -> Callable[[], nn.Module]:
    """Returns a function that builds a component's module with fresh weights; unknown settings are left out."""
    try:
        if component.library == "transformers":
            import transformers

            kind = getattr(transformers, component.class_name)
            config = kind.config_class(**component.config)
            return lambda: kind(config)
        import diffusers

        kind = getattr(diffusers, component.class_name)
    except ImportError as error:
        raise MissingDependencyError(f"{error.name} is not installed; pip install 'diffcore[models]'") from error
    known = inspect.signature(kind.__init__).parameters
    settings = {key: value for key, value in component.config.items() if key in known}
    return lambda: kind(**settings)


def on_meta(component: Component, factory: Callable[[], nn.Module]) -> nn.Module:
    """Builds a module on the meta device; raises where the configuration makes no sense."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            skeleton = factory()
    except Exception as error:  # whatever the library makes of impossible settings
        raise IncompatibleModelError(
            f"the configuration of {component.name} in {printable(component.folder, 300)} does not build "
            f"{component.class_name}: {printable(error)}; get a clean copy of the model"
        ) from None
    persistent = skeleton.state_dict(keep_vars=True).keys()
    loose = sum(b.numel() * b.element_size() for name, b in skeleton.named_buffers() if name not in persistent)
    if loose > MAX_BUFFER_BYTES:
        raise IncompatibleModelError(
            f"the configuration of {component.name} in {printable(component.folder, 300)} asks for tables of "
            f"{loose:,} bytes; get a clean copy of the model"
        )
    return skeleton


def _with_real_buffers(factory: Callable[[], nn.Module]) -> nn.Module:
    """Builds the module with empty parameters and computed buffers: no file holds position tables."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return factory()


def _shared_names(module: nn.Module) -> dict[str, str]:
    """Returns the names that stand for the tensor of another name, as tied weights do."""
    tied = getattr(module, "_tied_weights_keys", None)
    shared: dict[str, str] = dict(tied) if isinstance(tied, Mapping) else {}
    first: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        twin = first.setdefault(id(parameter), name)
        if twin != name:
            shared.setdefault(name, twin)
    return shared | {twin: name for name, twin in shared.items() if twin not in shared}


def _compare(
    component: Component,
    stored: Stored,
    wanted: Mapping[str, Shape],
    pieces: Mapping[str, Piece],
    shared: Mapping[str, str],
    skeleton: nn.Module,
    leftovers: re.Pattern[str],
) -> None:
    def here(name: str) -> bool:
        return pieces[name].name in stored.shapes

    missing = [name for name in wanted if not here(name) and not (name in shared and here(shared[name]))]
    if missing:
        raise _refusal(component, stored, f"lacks {_some(pieces[name].name for name in missing)}")
    tensors = skeleton.state_dict(keep_vars=True)
    for name, shape in wanted.items():
        piece = pieces[name]
        if not here(name):
            continue
        found = piece.shape(stored.shapes[piece.name])
        if found is None or _as_matrix(found) != _as_matrix(shape):
            raise _refusal(
                component,
                stored,
                f"has tensor {printable(piece.name)!r} of shape {list(stored.shapes[piece.name])}, "
                f"where {component.class_name} needs {list(shape)}",
            )
        if tensors[name].is_floating_point() != (piece.name in stored.floating):
            raise _refusal(component, stored, f"has tensor {printable(piece.name)!r} of another kind of number")
    used = {piece.name for piece in pieces.values()}
    extra = [name for name in stored.shapes if name not in used and not leftovers.fullmatch(name)]
    if extra:
        raise _refusal(component, stored, f"has {_some(extra)} too many for {component.class_name}")


def _read(
    component: Component,
    stored: Stored,
    pieces: Mapping[str, Piece],
    wanted: Mapping[str, Shape],
    dtype: torch.dtype,
    device: torch.device,
    skeleton: nn.Module,
    check_finite: bool,
) -> dict[str, Tensor]:
    targets: dict[str, list[str]] = {}
    for name, piece in pieces.items():
        if piece.name in stored.shapes:
            targets.setdefault(piece.name, []).append(name)
    wide = tuple(getattr(skeleton, "_keep_in_fp32_modules", None) or ())
    parameters = {name for name, _ in skeleton.named_parameters(remove_duplicate=False)}
    state: dict[str, Tensor] = {}
    for stored_name, tensor in stored.read(targets):
        for name in targets[stored_name]:
            value = pieces[name].apply(tensor).reshape(wanted[name])
            if value.is_floating_point():
                kept = torch.float32 if any(part in name.split(".") for part in wide) else dtype
                # A copy in any case: the file may change or go while the model lives.
                value = value.to(device, kept, copy=True)
            else:
                value = value.to(device, copy=True)
            if check_finite and value.is_floating_point() and not _is_finite(value):
                raise _refusal(
                    component, stored, f"has numbers in {printable(stored_name)!r} that are not finite in {value.dtype}"
                )
            value = value.contiguous()
            state[name] = nn.Parameter(value, requires_grad=False) if name in parameters else value
    return state


def _as_matrix(shape: Shape) -> Shape:
    """Returns the shape of a 1x1 convolution as a matrix: libraries store the same layer either way."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def _is_finite(tensor: Tensor) -> bool:
    """Returns whether every number is finite, by the extremes: they are finite exactly if all numbers are."""
    return not tensor.numel() or all(math.isfinite(float(extreme)) for extreme in tensor.aminmax())


def _some(names: Any) -> str:
    names = list(names)
    shown = ", ".join(printable(name) for name in names[:3])
    return f"{len(names)} tensors ({shown}{', …' if len(names) > 3 else ''})"


def _refusal(component: Component, stored: Stored, what: str) -> IncompatibleModelError:
    return IncompatibleModelError(
        f"{component.name} in {printable(stored.where, 300)} {what}; get a complete copy of the model, or the "
        "configuration that belongs to these weights"
    )
