"""Published reference statistics: clean-fid's `.npz` files with mean and covariance of Inception features."""

import math
import zipfile
from pathlib import Path

import numpy as np
import torch

from diffcore.errors import IncompatibleModelError, printable
from diffcore.io import files
from diffcore.stats import Covariance

MAX_COLUMNS = 16_384


def read_statistics(path: Path) -> Covariance:
    """Returns the mean `mu` and covariance `sigma` of a file; how many rows they were made of is not in it: NaN.

    Nothing is unpickled, and nothing is unpacked that is larger than its header says it is.

    Raises:
        IncompatibleModelError: The file is no such archive, or its arrays do not fit together.
        UserError: It cannot be read.
    """
    with files.explained(path, reading=True):
        try:
            with zipfile.ZipFile(path) as archive:
                mean, cov = (_read_array(archive, name) for name in ("mu", "sigma"))
        except (zipfile.BadZipFile, KeyError, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
            raise _refusal(path, f"is no file of reference statistics ({printable(error)})") from None
    if mean.ndim != 1 or cov.shape != 2 * mean.shape or not len(mean):
        raise _refusal(path, f"holds mu of shape {mean.shape} and sigma of shape {cov.shape}, which do not fit")
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise _refusal(path, "holds NaN or infinity")
    if np.abs(cov - cov.T).max() > 1e-3 * np.abs(cov).max():
        raise _refusal(path, "holds a sigma that is not symmetric")
    unknown = torch.tensor(math.nan, dtype=torch.float64)
    return Covariance(unknown, torch.from_numpy(mean), torch.from_numpy(cov))


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"{name} is of an unknown version of the npy format")
        shape, _, dtype = readers[version](file)  # a vector and a symmetric matrix are the same by row and by column
        if dtype not in (np.dtype("f4"), np.dtype("f8")):
            raise ValueError(f"{name} is of type {dtype}")
        if len(shape) > 2 or any(not 0 <= side <= MAX_COLUMNS for side in shape):
            raise ValueError(f"{name} has the shape {shape}; {MAX_COLUMNS} columns are the limit")
        data = file.read(math.prod(shape) * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(shape).astype(np.float64)


def _refusal(path: Path, what: str) -> IncompatibleModelError:
    return IncompatibleModelError(f"{printable(path, 300)} {what}; make or copy it again")
