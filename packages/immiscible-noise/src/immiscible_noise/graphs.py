"""What a compiled training step leaves to ordinary Python."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def outside_graphs(function: Callable[P, T]) -> Callable[P, T]:
    """Keeps `torch.compile` out of a function: its caller has one graph break there, whatever the function does.

    Exact solvers run on the host, and labels may be any Python values; neither can be traced.
    """
    # As torch keeps it out of its own optimizers. The public torch.compiler.disable imports the compiler, which takes
    # seconds, when a function is decorated; this imports it when a compiled step first meets the function.
    uncompiled = torch._disable_dynamo(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return uncompiled(*args, **kwargs) if torch.compiler.is_compiling() else function(*args, **kwargs)

    return call
