"""A threshold as a JSON file."""

from dataclasses import asdict
from pathlib import Path

from diffcore.errors import CorruptArtifactError, printable
from diffcore.io.jsonfile import read_trusted, write_json
from nemo_localize.calibrate import Calibration

FILE = "calibration.json"
_SCHEMA = "nemo-localize/calibration@1"


def save_calibration(path: Path, calibration: Calibration) -> Path:
    """Writes a calibration as JSON, and returns the path of the file."""
    return write_json(path, {"schema": _SCHEMA, **asdict(calibration)})


def load_calibration(path: Path) -> Calibration:
    """Reads what `save_calibration` wrote.

    Args:
        path: File, or the run folder that holds it.

    Raises:
        CorruptArtifactError: The file is damaged, or something else.
    """
    path = path / FILE if path.is_dir() else path
    found = read_trusted(path)
    if found.pop("schema", None) != _SCHEMA:
        raise CorruptArtifactError(f"{printable(path, 300)} is no calibration; make one with: nemo-localize calibrate")
    try:
        interval = found.pop("interval", None)
        return Calibration(**found, interval=interval and tuple(interval))
    except TypeError as error:
        raise CorruptArtifactError(f"{printable(path, 300)} is damaged ({error}); calibrate again") from error
