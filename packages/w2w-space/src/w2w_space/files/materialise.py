"""Adapters of other methods than LoRA, turned into a LoRA of one rank: LoHa, LoKr, and whole differences of weights.

With s = alpha / rank of the file, the changes are

    LoHa   s (B1 A1) * (B2 A2), number by number,    = s [rows of B1 x rows of B2] [columns of A1 x columns of A2]
    LoKr   s (W1 kron W2), each whole or a product,  = s (B1 kron B2) (A1 kron A2)
    diff   the difference itself,

where x is the Kronecker product of two rows or columns. The first two are products of rank r^2 and r1 r2: their nearest
change of a smaller rank follows from these factors, and no matrix of the size of a weight is formed. DoRA, and factors
with a core of their own (Tucker), are no change of the weight alone or not read, and stay refused by name.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffcore.adapters import Adapter, Base, LowRank
from diffcore.adapters.keys import BACKBONE, parse_key, quoted
from diffcore.adapters.scan import DIFFUSERS_WEIGHTS, PEFT_CONFIG, PEFT_WEIGHTS, refusal
from diffcore.errors import UserError, printable
from diffcore.io.strictjson import StrictError, read_untrusted
from diffcore.io.tensorfile import read_header
from w2w_space.ranks import RankLoss, at_rank

_PARTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2")
_PARTS += ("lokr_w2_a", "lokr_w2_b", "diff")
_LEAF = re.compile(rf"(?P<stem>.+)\.(?P<part>{'|'.join(_PARTS)}|alpha)(?:\.(?!weight$)[A-Za-z0-9_-]+)?(?:\.weight)?")


def materialise(path: Path | str, base: Base, rank: int) -> tuple[Adapter, dict[str, RankLoss]]:
    """Returns the nearest LoRA of a rank to a LoHa, a LoKr or whole differences, and the loss of each module.

    Args:
        path: Safetensors file of LyCORIS or of a web UI, or folder in PEFT's layout.
        base: Model that it is read for.
        rank: Rank of every module.

    Raises:
        IncompatibleModelError: The file holds tensors of other methods, or that have no place in the model.
        UserError: The file cannot be read, or `rank` is below 1.
    """
    if rank < 1:
        raise UserError(f"`rank` is {rank}; give at least 1")
    path = Path(path)
    weights, stated = _files_of(path)
    try:
        groups = _grouped(weights)
        changes: dict[str, dict[str, LowRank]] = {}
        losses: dict[str, RankLoss] = {}
        for stem, parts in groups.items():
            component, module, shape = _placed(stem, base)
            whole = _change(stem, parts, shape, stated)
            cut, loss = at_rank(whole, rank)
            changes.setdefault(component, {})[module] = cut
            losses[module if component == BACKBONE else f"{component}: {module}"] = loss
    except StrictError as error:
        raise refusal(path, str(error)) from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {printable(path, 300)}: {printable(error)}; copy it again") from error
    return Adapter(changes.pop(BACKBONE, {}), changes, base.backbone, path.stem), losses


def modules_of_other(path: Path | str, base: Base) -> dict[str, int]:
    """Returns the modules of the backbone that a LoHa, a LoKr or whole differences change, from the header alone.

    Args:
        path: Safetensors file or folder, as `materialise` takes it.
        base: Model that it is read for.

    Returns:
        The rank 0, which stands for any, by the name of each module.

    Raises:
        IncompatibleModelError: The file holds tensors of other methods, or that have no place in the model.
    """
    path = Path(path)
    weights, _ = _files_of(path)
    found: dict[str, int] = {}
    try:
        for stem in dict.fromkeys(_leaf(name)["stem"] for name in read_header(weights).tensors):
            component, module, _ = _placed(stem, base)
            if component == BACKBONE:
                found[module] = 0
    except StrictError as error:
        raise refusal(path, str(error)) from None
    if not found:
        raise refusal(path, "changes no module of the backbone by a LoHa, a LoKr or a difference")
    return found


def _leaf(name: str) -> re.Match[str]:
    match = _LEAF.fullmatch(name)
    if match is None:
        parse_key(name)  # refuses other methods by name
        raise StrictError(f"holds tensor {quoted(name)}, which belongs to no LoHa, LoKr or difference")
    return match


def _files_of(path: Path) -> tuple[Path, float | None]:
    """Returns the file of the tensors, and the strength alpha / rank that a configuration beside it states."""
    names = (path / name for name in (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS))
    weights = next((file for file in names if file.is_file()), path)
    config = weights.with_name(PEFT_CONFIG)
    if weights.name != PEFT_WEIGHTS or not config.is_file():
        return weights, None
    values = read_untrusted(config)
    rank, alpha = values.get("r"), values.get("alpha")
    if values.get("rank_pattern") or values.get("alpha_pattern"):
        raise refusal(config, "has ranks or alphas of single modules, which are not read for this method")
    if not (isinstance(rank, int) and rank > 0 and isinstance(alpha, int | float) and 0 < alpha < math.inf):
        raise refusal(config, "does not say r and alpha")
    return weights, alpha / rank


def _grouped(weights: Path) -> dict[str, dict[str, Tensor]]:
    """Returns the tensors of each module by their part, in float64."""
    header = read_header(weights)
    found: dict[str, dict[str, Tensor]] = {}
    with safe_open(weights, framework="pt") as file:
        for name in header.tensors:
            match = _leaf(name)
            tensor: Tensor = file.get_tensor(name)
            if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
                raise StrictError(f"has tensor {quoted(name)} with numbers that are not finite")
            found.setdefault(match["stem"], {})[match["part"]] = tensor.double()
    if not found:
        raise StrictError("holds no tensor; point to an adapter")
    return found


def _placed(stem: str, base: Base) -> tuple[str, str, tuple[int, ...]]:
    key = parse_key(f"{stem}.lora_down.weight")
    module, component = base.find(key.component, key.module), base.component(key.component)
    if module is None and key.layout in ("lycoris", "peft"):
        # Both name the modules of whatever network they wrap, and not the network.
        fitting = [(c, name) for c in base.shapes if (name := base.find(c, key.module)) is not None]
        component, module = fitting[0] if len(fitting) == 1 else (component, None)
    if module is None:
        nearest = base.nearest(key.component, key.module)
        hint = f", nearest: {quoted(nearest)}" if nearest else ""
        raise StrictError(f"changes {quoted(stem)}, which {printable(base.name)} does not have{hint}")
    return component, module, tuple(base.shapes[component][module])


def _change(stem: str, parts: Mapping[str, Tensor], shape: tuple[int, ...], stated: float | None) -> LowRank:
    """Returns the change of a module with exact factors."""
    kinds = {part.partition("_")[0] for part in parts if part != "alpha"}
    if len(kinds) != 1:
        raise StrictError(f"has factors of two methods, or none, for {quoted(stem)}")
    alpha = float(parts["alpha"].reshape(-1)[0]) if "alpha" in parts else None
    try:
        up, down, rank = {"hada": _hadamard, "lokr": _kronecker, "diff": _difference}[kinds.pop()](parts)
    except KeyError as error:
        raise StrictError(f"lacks {error.args[0]!r} of {quoted(stem)}") from None
    except RuntimeError as error:
        raise StrictError(f"has factors of {quoted(stem)} that do not fit together ({printable(error)})") from None
    if up.shape[1] != len(down):
        raise StrictError(
            f"has factors of {quoted(stem)} that do not fit together: ranks {up.shape[1]} and {len(down)}"
        )
    sides = (shape[0], math.prod(shape[1:]))
    if (len(up), down.shape[1]) != sides:
        raise StrictError(
            f"changes {quoted(stem)} by {len(up)}x{down.shape[1]} numbers, where the model has {sides[0]}x{sides[1]}"
        )
    # Without factors of a rank LyCORIS applies no strength, whatever alpha says.
    scale = stated if stated is not None else 1.0 if rank is None or alpha is None else alpha / rank
    return LowRank(down.reshape(-1, *shape[1:]), scale * up, float(len(down)))


def _hadamard(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, int]:
    b1, a1, b2, a2 = (parts[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    a1, a2 = a1.flatten(1), a2.flatten(1)
    up = torch.einsum("or,os->ors", b1, b2).flatten(1)
    return up, torch.einsum("ri,si->rsi", a1, a2).flatten(0, 1), len(a1)


def _kronecker(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, int | None]:
    ranks = list[int]()

    def factors(name: str) -> tuple[Tensor, Tensor]:
        if name in parts:
            matrix = parts[name].flatten(1)
            small = min(matrix.shape)
            one = torch.eye(small, dtype=matrix.dtype)
            return (matrix, one) if matrix.shape[1] == small else (one, matrix)
        up, down = parts[f"{name}_a"], parts[f"{name}_b"].flatten(1)
        ranks.append(len(down))
        return up, down

    (b1, a1), (b2, a2) = factors("lokr_w1"), factors("lokr_w2")
    return torch.kron(b1, b2), torch.kron(a1, a2), ranks[-1] if ranks else None


def _difference(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, None]:
    left, values, right = torch.linalg.svd(parts["diff"].flatten(1), full_matrices=False)
    return left * values, right, None
