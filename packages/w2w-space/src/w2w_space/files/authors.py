"""The authors' published files, read as a space.

With X of one row per model, mu and s its columns' means and standard deviations, their files hold V of Z = (X - mu) / s
= U S V^T, one column per component, and the coefficients beta of the models. A model is theta = mu + s (V beta), the
factors of rank 1 of each module one after the other, and its change is 27 B A.

Our vectors hold (A, 27 B), so that rows of mu and s that belong to B are multiplied by 27. Some published deviations
are negative: only s V matters, in which a negative s goes with a turned row of V, and the signs are kept.
"""

import math
import pickle
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffcore.adapters.keys import parse_key
from diffcore.errors import CorruptArtifactError, UserError, printable
from diffcore.io.strictjson import StrictError
from w2w_space.gauge import Gauge
from w2w_space.layout import Layout
from w2w_space.space import Fit, Point, WeightSpace

ALPHA = 27.0
"""Strength of the authors' adapters, whose rank is 1."""
MEAN, STD, COMPONENTS, DIMENSIONS = "mean.pt", "std.pt", "V.pt", "weight_dimensions.pt"
COEFFICIENTS, WEIGHTS = "proj_1000pc.pt", "all_weights.pt"
_ROWS = 1024  # of the authors' matrix that are projected at a time


def import_authors(
    folder: Path | str, *, allow_pickle: bool = False, num_components: int | None = None, alpha: float = ALPHA
) -> WeightSpace:
    """Returns the space of the authors' files mean.pt, std.pt, V.pt, weight_dimensions.pt, and models' coefficients.

    The coefficients are those of proj_1000pc.pt or, where all_weights.pt is there too and more components are asked
    for, are computed from it. Files are read with weights_only=True, which refuses pickled programs.

    Args:
        folder: Folder with the authors' files.
        allow_pickle: Whether pickles may be read at all; the authors publish no other form.
        num_components: Largest number of components; by default as many as there are coefficients.
        alpha: Strength that the adapters were trained with.

    Raises:
        UserError: Pickles are not allowed, or a file is missing.
        CorruptArtifactError: A file is damaged, or does not fit the others.
    """
    folder = Path(folder)
    if not allow_pickle:
        raise UserError(
            f"{printable(folder, 300)} holds pickles, which can run code when read; pass `allow_pickle`=True if you "
            "trust their source"
        )
    if num_components is not None and num_components < 1:
        raise UserError(f"`num_components` is {num_components}; give at least 1")
    modules, shapes, order = _table(folder / DIMENSIONS)
    layout = Layout(tuple(modules), tuple(shapes), 1)
    mean, std = (_vector(folder / name, layout)[order] for name in (MEAN, STD))
    v = _tensor(folder / COMPONENTS)
    if v.ndim != 2 or v.shape[0] != layout.size:
        raise _unfit(folder / COMPONENTS, v, f"{layout.size:,} rows")
    std = std.masked_fill(std == 0, 1.0)
    coefficients = _coefficients(folder, v, mean, std, order, num_components)
    components = v[:, : coefficients.shape[1]][order].float().T.contiguous()
    strength = torch.ones(layout.size)
    for (inputs, _), span in zip(layout.sides, layout.spans, strict=True):
        strength[span.start + inputs : span.stop] = alpha
    variances = coefficients.double().var(0)
    if not bool(variances.isfinite().all()) or not all(bool(t.isfinite().all()) for t in (mean, std, components)):
        raise CorruptArtifactError(
            f"{printable(folder, 300)} has numbers that are NaN or infinite; get the authors' files again"
        )
    if bool((variances <= 0).any()):
        raise CorruptArtifactError(
            f"{printable(folder, 300)} has a component along which all models are equal; read fewer `num_components`"
        )
    sizes = std.abs()
    fit = Fit("published", "standard", float(layout.size), 0, float(sizes.max() / sizes.min()))
    return WeightSpace(
        Gauge(layout, torch.zeros(layout.size), "raw"),
        mean * strength,
        std * strength,
        components,
        variances=variances,
        fit=fit,
        names=tuple(str(row) for row in range(len(coefficients))),
        members=(coefficients.double() / variances.sqrt()).float(),
    )


def read_authors_point(path: Path | str, space: WeightSpace, *, allow_pickle: bool = False) -> Point:
    """Returns a model of the authors, such as w2wmodel.pt: coefficients of the first components, the others zero.

    Args:
        path: File with a row of coefficients.
        space: Space of the authors' files.
        allow_pickle: Whether pickles may be read at all.

    Raises:
        UserError: Pickles are not allowed, or the file is missing.
        CorruptArtifactError: The file is damaged, or has more coefficients than the space has components.
    """
    if not allow_pickle:
        raise UserError(f"{printable(path, 300)} is a pickle; pass `allow_pickle`=True if you trust its source")
    beta = _tensor(Path(path)).float().flatten()
    if not bool(beta.isfinite().all()):
        raise CorruptArtifactError(f"{printable(path, 300)} has numbers that are NaN or infinite; get it again")
    if len(beta) > space.num_components:
        raise _unfit(Path(path), beta, f"at most {space.num_components} numbers")
    z = torch.zeros(space.num_components)
    z[: len(beta)] = beta / space.sigma[: len(beta)]
    return space.point(z)


def _table(path: Path) -> tuple[list[str], list[tuple[int, int]], Tensor]:
    """Returns names and shapes of the modules, and where each number of our vectors stands in the authors'."""
    table = _unpickled(path)
    found: dict[str, dict[str, tuple[range, tuple[int, ...]]]] = {}
    start = 0
    try:
        for text, (count, shape) in table.items():
            key, size = parse_key(str(text)), int(count[0])
            if size != math.prod(shape):
                raise ValueError(f"{size} numbers for shape {tuple(shape)}")
            found.setdefault(key.module, {})[key.part] = (
                range(start, start + size),
                tuple(int(side) for side in shape),
            )
            start += size
        modules = sorted(found, key=lambda module: found[module]["down"][0].start)
        places = [torch.tensor(found[module][part][0]) for module in modules for part in ("down", "up")]
        shapes = [(found[module]["up"][1][0], found[module]["down"][1][1]) for module in modules]
        if any(found[module]["down"][1][0] != 1 or found[module]["up"][1][1] != 1 for module in modules):
            raise ValueError("rank above 1")
    except (StrictError, AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise CorruptArtifactError(
            f"{printable(path, 300)} is no table of factors of rank 1 ({printable(error)}); get the authors' file again"
        ) from error
    return modules, shapes, torch.cat(places)


def _coefficients(
    folder: Path, v: Tensor, mean: Tensor, std: Tensor, order: Tensor, count: int | None
) -> Float[Tensor, "n m"]:
    """Returns the models' coefficients, stored or computed."""
    stored = folder / COEFFICIENTS
    if stored.is_file():
        found = _tensor(stored)
        if found.ndim != 2:
            raise _unfit(stored, found, "a row of coefficients for each model")
        if not (folder / WEIGHTS).is_file() or count is None or count <= found.shape[1]:
            return found[:, : min(found.shape[1], v.shape[1], count or v.shape[1])].float()
    elif not (folder / WEIGHTS).is_file():
        raise UserError(
            f"{printable(folder, 300)} holds neither {COEFFICIENTS} nor {WEIGHTS}: without the models' coefficients "
            "the components have no unit; get one of the two"
        )
    models = _tensor(folder / WEIGHTS)
    if models.ndim != 2 or models.shape[1] != len(mean):
        raise _unfit(folder / WEIGHTS, models, f"{len(mean):,} columns")
    basis = v[:, : count or v.shape[1]][order].float()
    return torch.cat([((rows[:, order].float() - mean) / std) @ basis for rows in models.split(_ROWS)])


def _vector(path: Path, layout: Layout) -> Tensor:
    found = _tensor(path).float().flatten()
    if len(found) != layout.size:
        raise _unfit(path, found, f"{layout.size:,} numbers")
    return found


def _tensor(path: Path) -> Tensor:
    found = _unpickled(path)
    if not isinstance(found, Tensor):
        raise CorruptArtifactError(f"{printable(path, 300)} holds no tensor; get the authors' file again")
    return found


def _unpickled(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{printable(path, 300)} is missing; get all of the authors' files")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
        raise CorruptArtifactError(
            f"{printable(path, 300)} is no file of tensors ({printable(error)}); get the authors' file again"
        ) from error


def _unfit(path: Path, found: Tensor, wanted: str) -> CorruptArtifactError:
    return CorruptArtifactError(f"{printable(path, 300)} has shape {tuple(found.shape)} where {wanted} are needed")
