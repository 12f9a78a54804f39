"""A space on disk: `space.safetensors`, and beside it `space.json` with the layout and how the space was computed."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffcore.adapters import Base
from diffcore.errors import UserError, printable
from diffcore.io import artifact
from w2w_space.coordinates import Alignment, Fit, Space
from w2w_space.files.base import base_from_json, base_of_layout, base_to_json
from w2w_space.gauge import Gauge
from w2w_space.layout import Layout
from w2w_space.product_space import ProductSpace
from w2w_space.space import WeightSpace

FILE = "space.safetensors"
SCHEMA = "w2w-space/space@1"
_DTYPES = {"float16": torch.float16, "float32": torch.float32}


def save_space(
    space: Space,
    path: Path | str,
    *,
    base: Base | None = None,
    dtype: Literal["float16", "float32"] = "float16",
    members: bool = True,
    **details: Any,
) -> Path:
    """Writes a space, and returns its file.

    Args:
        space: The space to write.
        path: File that ends in .safetensors, or the folder that shall hold `space.safetensors`.
        base: Model whose adapters the points are; with it, adapters of all its layers can be projected.
        dtype: Type of the components, whose entries are below 1; all else keeps its precision.
        members: Whether names and coordinates of the members are written: they reproduce the members, and are personal
            data where the members are persons. A space of products is made of its members.
        **details: Plain values about how the space was made.

    Raises:
        MachineError: The disk is full or failing.

    Example:
        >>> from w2w_space.population import Population, Stacked
        >>> layout, matrix = Layout.of({"to_q": (4, 3)}, rank=1), torch.randn(5, 7)
        >>> space = WeightSpace.build(Population(layout, tuple("abcde"), Stacked(matrix)))
        >>> path = save_space(space, "space.safetensors", dtype="float32")
        >>> torch.equal(load_space(path).components, space.components)
        True
    """
    if not members:
        space = space.without_members()
    layout = space.layout
    tensors: dict[str, Tensor] = {"variances": space.variances}
    if isinstance(space, ProductSpace):
        tensors |= {"adapters": space.adapters.float(), "centre": space.centre}
        details |= {"table": space.table.to_json()}
    elif isinstance(space, WeightSpace):
        tensors |= {"mean": space.mean, "scale": space.scale, "components": space.components.to(_DTYPES[dtype])}
        for name, span in zip(layout.modules, layout.spans, strict=True):
            tensors[f"gauge.{name}"] = space.gauge.reference[span]
    if space.names:
        tensors["members.coefficients"] = space.members
        if len(space.held_out):
            tensors["members.held_out"] = space.held_out
    return artifact.save(
        _file(path),
        tensors,
        schema=SCHEMA,
        layout=layout.to_json(),
        base=base_to_json(base or base_of_layout(layout)),
        gauge=space.kind,
        fit=asdict(space.fit),
        shrinkage=space.shrinkage,
        members_included=bool(space.names),
        members=list(space.names),
        fingerprint=space.fingerprint,
        **details,
    )


def load_space(path: Path | str) -> WeightSpace:
    """Returns a space of factors that `save_space` wrote, in float32.

    Args:
        path: File of the space, or the folder that holds it.

    Raises:
        UserError: There is no space, or it is one of products.
        CorruptArtifactError: The file is damaged, or of a newer version.
    """
    found = load_any_space(path)
    if not isinstance(found, WeightSpace):
        raise UserError(f"{printable(path, 300)} is a space of products; this needs one of factors, as `build` makes")
    return found


def load_any_space(path: Path | str) -> Space:
    """Returns a space that `save_space` wrote, of factors or of products, in float32.

    Args:
        path: File of the space, or the folder that holds it.

    Raises:
        UserError: There is no space.
        CorruptArtifactError: The file is damaged, or of a newer version.
    """
    stored = artifact.load(_there(path), schema=SCHEMA)
    fields, tensors = stored.fields, stored.tensors
    layout, told, empty = Layout.from_json(fields["layout"]), fields["fit"], torch.empty(0, len(tensors["variances"]))
    shared = {
        "variances": tensors["variances"],
        "fit": Fit(**(told | {"alignment": tuple(Alignment(**one) for one in told["alignment"])})),
        "names": tuple(fields["members"]),
        "members": tensors.get("members.coefficients", empty),
        "held_out": tensors.get("members.held_out", empty),
        "shrinkage": fields["shrinkage"],
    }
    if fields["gauge"] == "product":
        table = Layout.from_json(fields["table"])
        return ProductSpace(table, tensors["adapters"].float(), tensors["centre"], layout.rank, **shared)
    reference = torch.cat([tensors[f"gauge.{name}"] for name in layout.modules])
    rule = Gauge(layout, reference, fields["gauge"])
    return WeightSpace(rule, tensors["mean"], tensors["scale"], tensors["components"].float(), **shared)


def details_of_space(path: Path | str) -> dict[str, Any]:
    """Returns the plain values beside a space, without reading its tensors.

    Args:
        path: File of the space, or the folder that holds it.
    """
    return artifact.check(_there(path), verify=False)


def base_of_space(path: Path | str) -> Base:
    """Returns the model whose adapters the points of a stored space are: names and shapes of its weights.

    Args:
        path: File of the space, or the folder that holds it.
    """
    return base_from_json(details_of_space(path)["base"])


def is_space(path: Path | str) -> bool:
    """Returns whether a space is there.

    Args:
        path: A file or folder of any kind.
    """
    sidecar = _file(path).with_suffix(".json")
    if not (_file(path).is_file() and sidecar.is_file()):
        return False
    try:
        return str(artifact.check(_file(path), verify=False)["schema"]).startswith(SCHEMA.partition("@")[0])
    except UserError:
        return False


def _file(path: Path | str) -> Path:
    path = Path(path)
    return path / FILE if path.is_dir() or path.suffix not in (".safetensors", ".json") else path


def _there(path: Path | str) -> Path:
    if not (found := _file(path)).with_suffix(".safetensors").is_file():
        raise UserError(
            f"{printable(path, 300)} holds no space; give a space file, or the folder of a run that made one"
        )
    return found
