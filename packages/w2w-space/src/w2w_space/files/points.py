"""A point on disk: coordinates, and the fingerprint of the space that gives them their meaning."""

from pathlib import Path

from diffcore.errors import IncompatibleModelError, UserError, printable
from diffcore.io import artifact
from w2w_space.coordinates import Point, Space

SCHEMA = "w2w-space/point@1"


def save_point(point: Point, path: Path | str, *, name: str = "", **details: object) -> Path:
    """Writes a point, a few kilobytes, and returns its file.

    Args:
        point: Point of a space.
        path: File that ends in .safetensors.
        name: Name of the subject.
        **details: Plain values about where the point comes from.
    """
    return artifact.save(
        Path(path),
        {"coefficients": point.z},
        schema=SCHEMA,
        space=point.space.fingerprint,
        name=name or Path(path).stem,
        residual=point.residual,
        projected=point.projected,
        **details,
    )


def load_point(path: Path | str, space: Space) -> Point:
    """Returns a point that `save_point` wrote.

    Args:
        path: File of the point.
        space: Space that the point belongs to.

    Raises:
        IncompatibleModelError: The point belongs to another space, in which its coordinates mean something else.
        CorruptArtifactError: The file is damaged, or no point.
    """
    stored = artifact.load(Path(path), schema=SCHEMA)
    if stored.fields["space"] != space.fingerprint:
        raise IncompatibleModelError(
            f"{printable(path, 300)} is a point of another space, where its coordinates mean something else; export it "
            "as an adapter with its own space, and project that"
        )
    fields = stored.fields
    # Points of earlier versions do not say it: those with a residual were projected.
    projected = fields.get("projected", fields["residual"] is not None)
    return Point(space, stored.tensors["coefficients"], fields["residual"], projected)


def is_point(path: Path | str) -> bool:
    """Returns whether a file is a point.

    Args:
        path: A file of any kind.
    """
    path = Path(path)
    if path.suffix != ".safetensors" or not path.with_suffix(".json").is_file():
        return False
    try:
        return str(artifact.check(path, verify=False)["schema"]).startswith(SCHEMA.partition("@")[0])
    except UserError:
        return False
