"""The errors that users of diffcore can act on.

Two families: `UserError` is what the user can fix (exit code 2), `MachineError` is what the machine did (exit code 3:
nothing finished is lost, the same command may be run again). Everything else that escapes is a bug.

A message has three parts, in this order: what was wrong, with which input, what to do.
"""

import unicodedata


class UserError(Exception):
    """An error that the user can fix; commands print it without a traceback and exit with code 2."""

    exit_code = 2


class ModelNotFoundError(UserError):
    """There is no model where the user pointed."""


class NoMatchError(UserError):
    """A pattern or name matches nothing in a model."""


class IncompatibleModelError(UserError):
    """The model is of a kind, or in a state, that the operation does not support."""


class CorruptArtifactError(UserError):
    """A file that diffcore wrote is truncated, altered, or of a newer schema than this version reads."""


class RunMismatchError(UserError):
    """A run folder holds results of other settings or other inputs."""


class MissingDependencyError(UserError):
    """An optional dependency is needed; the message holds the install line."""


class MachineError(Exception):
    """The machine failed, not the input (disk full, out of memory, folder locked): exit code 3."""

    exit_code = 3


def printable(text: object, limit: int = 80) -> str:
    r"""Returns foreign text safe for a terminal, a log or a message.

    Control characters (C0, C1, DEL), bidirectional overrides, lone surrogates and line separators become visible
    escapes, such as ``\x1b``; text longer than `limit` characters is cut and ends in an ellipsis.

    Args:
        text: Anything with a string form: a prompt, a file name, a tensor name.
        limit: The most characters returned.
    """
    # Cc: controls; Cf: formats, bidi overrides among them; Cs: surrogates; Zl, Zp: line and paragraph separators.
    hidden = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    # One escape is at least one character long, so the first `limit + 1` characters decide the result.
    head = str(text)[: limit + 1]
    shown = "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in hidden else c for c in head)
    return shown if len(shown) <= limit else shown[: max(limit - 1, 0)] + "…"
