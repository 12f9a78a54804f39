"""Reading untrusted adapter files for a known model: every tensor finds its module, or the file is refused."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffcore.adapters.adapter import Adapter, LowRank
from diffcore.adapters.base import Base, Shape
from diffcore.adapters.keys import BACKBONE, Layout, quoted
from diffcore.adapters.scan import AdapterFile, Pair, refusal, scan_adapter
from diffcore.adapters.settings import checked_alpha
from diffcore.errors import UserError, printable
from diffcore.io.strictjson import StrictError


def read_adapter(path: Path | str, base: Base) -> Adapter:
    """Reads a LoRA: a PEFT folder, a file of diffusers (old and new keys), of kohya, LyCORIS, OneTrainer or ComfyUI.

    Factors stay as they are stored. Where a file states no alpha, alpha is the rank, as in other tools, with a warning.
    The alpha of rsLoRA is converted, so that alpha / rank has the same effect.

    Args:
        path: A safetensors file, or a folder with PEFT's or diffusers' file names.
        base: The model that it is read for.

    Raises:
        ModelNotFoundError: There is no such file.
        IncompatibleModelError: It is no LoRA, breaks a rule, holds numbers that are not finite, or holds any tensor
            that has no place in the model.
    """
    return read_scanned(scan_adapter(path), base, stacklevel=3)


def read_scanned(found: AdapterFile, base: Base, *, stacklevel: int = 2) -> Adapter:
    """Reads the LoRA of a file whose header was checked; all else as in `read_adapter`.

    Args:
        found: File as `scan_adapter` returns it.
        base: The model that it is read for.
        stacklevel: Number of calls above, to which warnings are attributed.
    """
    places = place(found, base)
    try:
        tensors = read_tensors(found)
        alphas = alphas_of(found, tensors)
    except StrictError as error:
        raise refusal(found.path, str(error)) from None
    if silent := sum(alpha is None for alpha in alphas.values()):
        warnings.warn(
            f"{printable(found.path, 300)} does not say the alpha of {silent} of {len(alphas)} modules; the rank is "
            "taken, as other tools do: if it was trained with another alpha, its strength is lost",
            stacklevel=stacklevel,
        )
    components: dict[str, dict[str, LowRank]] = {}
    for pair in found.pairs:
        component, module = places[pair]
        shape = base.shapes[component][module]
        down = tensors[pair.down].reshape(pair.rank, *shape[1:])
        alpha = alphas[pair]
        up = tensors[pair.up].reshape(shape[0], pair.rank)
        change = LowRank(down, up, float(pair.rank) if alpha is None else alpha)
        components.setdefault(component, {})[module] = change
    modules = components.pop(BACKBONE, {})
    return Adapter(modules, components, base.backbone, found.path.stem)


def place(found: AdapterFile, base: Base) -> dict[Pair, tuple[str, str]]:
    """Returns component and module of every pair.

    Raises:
        IncompatibleModelError: Some tensors belong to no module, or have other shapes than theirs.
    """
    places = {pair: where for pair in found.pairs if (where := _placed(pair, base, found.layout)) is not None}
    if not places:
        raise refusal(found.path, f"holds nothing that fits {printable(base.name)}{_three_of_each(found, base)}")
    if lost := [pair for pair in found.pairs if pair not in places]:
        count = sum(3 if pair.alpha else 2 for pair in lost)
        nearest = base.nearest(lost[0].component, lost[0].module)
        hint = f", nearest: {quoted(nearest)}" if nearest else f": there is no {lost[0].component}"
        hint = _prefix_of(lost[0], base) or hint
        raise refusal(
            found.path,
            f"has {count} of {len(found.header.tensors)} adapter tensors that do not fit {printable(base.name)}; "
            f"first: {quoted(lost[0].down)}{hint}",
        )
    taken: dict[tuple[str, str], Pair] = {}
    for pair, (component, module) in places.items():
        if (other := taken.setdefault((component, module), pair)) is not pair:
            raise refusal(found.path, f"changes {module!r} twice, as {quoted(other.down)} and {quoted(pair.down)}")
        shape = base.shapes[component][module]
        if pair.outputs != shape[0] or _squeezed(pair.inputs) != _squeezed(shape[1:]):
            raise refusal(
                found.path,
                f"has tensor {quoted(pair.down)} for a weight of {_shown((pair.outputs, *pair.inputs))}, but "
                f"{module!r} of {printable(base.name)} is {_shown(shape)}; load the model that it was made for",
            )
    return places


def _placed(pair: Pair, base: Base, layout: Layout) -> tuple[str, str] | None:
    """Returns component and module of a pair; None if the model has no such module, or several."""
    if (module := base.find(pair.component, pair.module)) is not None:
        return base.component(pair.component), module
    if layout not in ("lycoris", "peft"):
        return None
    # Both name the modules of whatever network they wrap, and not the network.
    fitting = [
        (component, name) for component in base.shapes if (name := base.find(component, pair.module)) is not None
    ]
    return fitting[0] if len(fitting) == 1 else None


def read_tensors(found: AdapterFile, names: frozenset[str] | None = None) -> dict[str, Tensor]:
    """Returns the tensors of an adapter, on the CPU.

    Args:
        found: An adapter file whose header was checked.
        names: Names of the tensors to read; by default all.

    Raises:
        UserError: The file cannot be read.
        StrictError: A number is not finite.
    """
    try:
        with safe_open(found.header.path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in found.header.tensors if names is None or name in names}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"cannot read {printable(found.header.path, 300)}: {printable(error)}; copy it again"
        ) from error
    for dtype in sorted({tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}, key=str):
        some = {name: tensor for name, tensor in tensors.items() if tensor.dtype == dtype}
        # All at once, as there are many small ones.
        if not bool(torch.cat([tensor.flatten() for tensor in some.values()]).isfinite().all()):
            name = next(name for name, tensor in some.items() if not bool(tensor.isfinite().all()))
            raise StrictError(f"has tensor {quoted(name)} with numbers that are not finite")
    return tensors


def alphas_of(found: AdapterFile, tensors: Mapping[str, Tensor]) -> dict[Pair, float | None]:
    """Returns the alpha of each pair, from its own tensor or from the configuration; None where neither says it.

    Args:
        found: An adapter file whose header was checked.
        tensors: Tensors of the file by name; those of the alphas are enough.

    Raises:
        StrictError: Tensor and configuration contradict each other, or an alpha is impossible.
    """
    alphas: dict[Pair, float | None] = {}
    for pair in found.pairs:
        stored = checked_alpha(tensors[pair.alpha].item(), f"tensor {quoted(pair.alpha)}") if pair.alpha else None
        stated = _stated(found, pair)
        if stored is not None and stated is not None and stored != stated:
            raise StrictError(
                f"says alpha = {stored:g} in tensor {quoted(pair.alpha or '')} and {stated:g} in its configuration"
            )
        alphas[pair] = stated if stored is None else stored
    return alphas


def _stated(found: AdapterFile, pair: Pair) -> float | None:
    settings = found.settings.get(pair.component)
    if settings is None:
        return None
    if (rank := settings.rank_of(pair.module)) != pair.rank:
        raise StrictError(f"has tensor {quoted(pair.down)} of rank {pair.rank}, but its configuration says {rank}")
    return settings.alpha_of(pair.module, pair.rank)


def _three_of_each(found: AdapterFile, base: Base) -> str:
    theirs = ", ".join(quoted(pair.spelling) for pair in found.pairs[:3])
    component = base.component(found.pairs[0].component)
    if prefix := _prefix_of(found.pairs[0], base):
        return prefix
    if component not in base.shapes:
        return f": it changes {component}, which the model lacks; load the whole pipeline"
    ours = ", ".join(map(repr, list(base.shapes[component])[:3]))
    return f": it changes {theirs}, where the model has {ours}; load the model that it was made for"


def _prefix_of(pair: Pair, base: Base) -> str:
    """Returns a hint, for a message, at an unknown prefix before a module's name; empty if there is none."""
    prefix = base.unread_prefix(pair.module)
    if not prefix:
        return ""
    return (
        f": it names modules under the prefix {quoted(prefix)}, which is not read; rename them as diffusers or kohya do"
    )


def _squeezed(sides: Shape) -> Shape:
    """Returns a shape without the trailing ones of a 1x1 kernel: such a factor may be stored as a matrix."""
    return sides[:1] if all(side == 1 for side in sides[1:]) else sides


def _shown(shape: Shape) -> str:
    return "x".join(map(str, shape))
