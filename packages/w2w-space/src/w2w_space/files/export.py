"""A point of a space as files of other tools: an ordinary LoRA, or a merged checkpoint, with a card beside it.

Tools disagree about alpha, rank patterns and names, so that what is written has alpha = rank, one rank, and factors of
equal norm; it is read back, and its changes are compared with the point's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffcore.adapters import Adapter, Base, Format, read_adapter, write_adapter
from diffcore.errors import MachineError, printable
from diffcore.io.jsonfile import write_text
from w2w_space.files.base import base_of_layout
from w2w_space.gauge import apart, balanced
from w2w_space.layout import Layout
from w2w_space.space import Point

if TYPE_CHECKING:
    from diffcore.models import DiffusionModel

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_WORST = 0.03  # relative error of a change that the rounding of its factors may cause


@dataclass(frozen=True)
class Exported:
    """A written adapter.

    Attributes:
        path: File or folder that was written.
        dtype: Type of the numbers.
        error: Largest relative error of a module's change, read back.
        card: File of the card; None where none was written.
    """

    path: Path
    dtype: torch.dtype
    error: float
    card: Path | None


def export_point(
    point: Point,
    path: Path | str,
    *,
    format: Format = "diffusers",
    dtype: torch.dtype | None = None,
    base: Base | None = None,
    overwrite: bool = False,
    card: Mapping[str, Any] | None = None,
    scale: float = 1.0,
) -> Exported:
    """Writes a point as a LoRA that other tools apply at its right strength.

    Args:
        point: Point of a space.
        path: File that ends in .safetensors; for "peft" the folder.
        format: "diffusers" for `load_lora_weights`, "kohya" for web UIs, "peft" for `PeftModel.from_pretrained`.
        dtype: Type of the numbers; by default the narrowest that holds them, float16 where it does.
        base: Model of the space; needed for kohya's names of SDXL modules.
        overwrite: Whether an existing adapter may be replaced.
        card: Facts for the card beside the adapter; None writes no card.
        scale: Strength alpha / rank that the file states, such as the authors' 27. Tools that read no alpha show an
            adapter of another strength than 1 wrongly.

    Raises:
        UserError: Something is there already, or the layout or type cannot hold the adapter.
        MachineError: The disk is full, or what was read back is not what was written.

    Example:
        >>> from w2w_space import Population, WeightSpace
        >>> from w2w_space.population import Stacked
        >>> layout = Layout.of({"down.attn1.to_q": (4, 3)}, rank=1)
        >>> space = WeightSpace.build(Population(layout, tuple("abcde"), Stacked(torch.randn(5, 7))))
        >>> written = export_point(space.point(), "mean.safetensors")
        >>> written.dtype, written.error < 1e-3
        (torch.float16, True)
    """
    path = Path(path)
    done = export_vector(
        point.space.layout, point.vector, path, format=format, dtype=dtype, base=base, overwrite=overwrite, scale=scale
    )
    stated = {} if scale == 1 else {"strength stated in the file": scale}
    return done if card is None else replace(done, card=write_card(point, path, {"format": format, **stated, **card}))


def export_vector(
    layout: Layout,
    vector: Float[Tensor, " size"],
    path: Path | str,
    *,
    format: Format = "diffusers",
    dtype: torch.dtype | None = None,
    base: Base | None = None,
    overwrite: bool = False,
    scale: float = 1.0,
) -> Exported:
    """Writes a vector, in any gauge, as a LoRA that other tools apply at its right strength.

    Args:
        layout: Table of the vector.
        vector: Vector of the adapter, with the scale of the change in B.
        path: File that ends in .safetensors; for "peft" the folder.
        format: "diffusers" for `load_lora_weights`, "kohya" for web UIs, "peft" for `PeftModel.from_pretrained`.
        dtype: Type of the numbers; by default the narrowest that holds them, float16 where it does.
        base: Model of the adapter; needed for kohya's names of SDXL modules.
        overwrite: Whether an existing adapter may be replaced.
        scale: Strength alpha / rank that the file states.

    Raises:
        UserError: Something is there already, or the layout or type cannot hold the adapter.
        MachineError: The disk is full, or what was read back is not what was written.
    """
    path = Path(path)
    vector = balanced_vector(layout, vector)
    adapter = layout.adapter(vector, name=path.stem)
    base = base or base_of_layout(layout)
    chosen = next(t for t in _DTYPES if t == torch.float32 or _holds(layout, vector, t)) if dtype is None else dtype
    written = write_adapter(adapter, path, format=format, dtype=chosen, base=base, overwrite=overwrite, scale=scale)
    error = largest_error(adapter, read_adapter(written, base))
    if error > _WORST:
        raise MachineError(
            f"{printable(written, 300)} reads back with a relative error of {error:.1g}; check the disk, or write "
            "float32"
        )
    return Exported(written, chosen, error, None)


def merge_point(model: "DiffusionModel", point: Point, folder: Path | str, *, weight: float = 1.0) -> Path:
    """Writes a model with a point merged into it, in the layout of diffusers, and returns its folder.

    Args:
        model: Base model of the space.
        point: Point of the space.
        folder: Place of the new folder; nothing may be there yet.
        weight: Strength of the change; 1 is what the point stands for.

    Raises:
        UserError: Something is there already, or the point does not fit the model.
    """
    merged = model.with_adapter(point.adapter(Path(folder).name), weight).save(folder)
    write_card(point, merged, {"format": "merged checkpoint", "base": model.name, "weight": weight})
    return merged


def balanced_vector(layout: Layout, vector: Float[Tensor, " size"]) -> Float[Tensor, " size"]:
    """Returns the vector of the same changes with factors of equal norm, which narrow types hold best.

    Args:
        layout: Table of the vector.
        vector: Vector in any gauge.
    """
    parts = [
        apart(layout, balanced(layout, vector[None, span], place), place)[0] for place, span in enumerate(layout.spans)
    ]
    return torch.cat(parts)


def largest_error(adapter: Adapter, other: Adapter) -> float:
    """Returns the largest relative error of a module's change between two adapters of the same modules.

    Args:
        adapter: Adapter that is compared with.
        other: Adapter that may have been rounded.
    """
    errors = (change.relative_error(other.components[component][module]) for component, module, change in adapter)
    return max(errors, default=0.0)


def write_card(point: Point, path: Path, facts: Mapping[str, Any]) -> Path:
    """Writes what people need to know of an exported point, and returns the file.

    Args:
        point: Point that was exported.
        path: Adapter that the card is about: README.md in a folder, NAME.md beside a file.
        facts: Facts that are listed, by their names.
    """
    space = point.space
    rows = {
        "method": "weights2weights (w2w-space)",
        **facts,
        "space": space.fingerprint[:16],
        "components": space.num_components,
        "rank": space.layout.rank,
        "modules": len(space.layout.modules),
        "distance from the mean (standard deviations)": f"{point.length:.2f}, of members about "
        f"{space.num_components**0.5:.2f}",
    }
    if point.residual is not None:
        rows["share of the source that the space does not hold"] = f"{point.residual:.3f}"
    usage = "\n".join(f"- {name}: {value}" for name, value in rows.items())
    text = (
        f"# {path.stem}\n\nAn adapter from a linear space over many adapters of one base model. Its strength is folded "
        f"into the factors: load it at weight 1.\n\n{usage}\n\nIf the space was made of persons, the adapter may show "
        "one: share it only with their consent.\n"
    )
    return write_text(path / "README.md" if path.is_dir() else path.with_suffix(".md"), text)


def _holds(layout: Layout, vector: Tensor, dtype: torch.dtype) -> bool:
    """Returns whether a type holds the factors of every module to within a thousandth of their norm."""
    for down, up in layout.factors(vector).values():
        for factor in (down, up):
            error = (factor.to(dtype).float() - factor).norm()
            if not bool(error <= 1e-3 * factor.norm()) and bool(factor.any()):
                return False
    return True
