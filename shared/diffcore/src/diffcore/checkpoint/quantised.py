"""Refusing quantised weights, whose stored numbers are not the weights themselves. Imports no torch."""

import re

from diffcore.errors import IncompatibleModelError, printable
from diffcore.io.tensorfile import TensorHeader

_SCALES = re.compile(
    r"(.+\.)?(scaled_fp8|comfy_quant|scale_(weight|input)|(weight|input)_scale(_\d|_inv)?|SCB|weight_format"
    r"|(nested_)?(absmax|quant_map)|quant_state\..+|q(weight|zeros))"
)
_PACKED = ("I8", "U8")


def refuse_quantised(header: TensorHeader) -> None:
    """Raises IncompatibleModelError where numbers of a file must be scaled or unpacked before they are weights.

    Plain 8-bit floats are accepted, as they need no scale to be weights.
    """
    for name, entry in header.tensors.items():
        packed = entry.dtype in _PACKED and len(entry.shape) > 1 and name.endswith(".weight")
        if packed or _SCALES.fullmatch(name):
            raise IncompatibleModelError(
                f"{printable(header.path, 300)} is quantised ({printable(name)!r} of {entry.dtype} says how), which "
                "is not supported; use the weights it was made from"
            )
