"""The base of every console script: the app, exit codes, progress, and where output goes.

Standard output is the result; progress, warnings and errors go to standard error. Imports no torch, so that --help is
quick; `main` sets the environment before a command imports anything heavy.
"""

import json
import logging
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, TypeVar

from cyclopts import App, CycloptsError

from diffcore.batching import is_out_of_memory
from diffcore.cli import config as config_file
from diffcore.cli.options import Output
from diffcore.errors import MachineError, UserError, printable
from diffcore.io import files
from diffcore.io.jsonfile import jsonable

if TYPE_CHECKING:
    from diffcore.run import Run

T = TypeVar("T")

_PROGRESS_SECONDS = 30.0
_SENTENCES, _LIST = 2000, 200  # most characters of a text and of a list that are printed
# Options that the command line calls otherwise than the library calls the parameter.
_RENAMED = {"folder": "out", "json_path": "json"}
BUG, INTERRUPTED, TERMINATED = 70, 130, 143


def make_app(name: str, help: str, package: str) -> App:
    """Returns the app of a console script; calling it with tokens runs a command in-process and returns its value.

    A command returns None or an exit code: 0 for success, 1 for a check that failed.

    Args:
        name: Name of the console script.
        help: One sentence and the shortest command that works.
        package: Distribution whose version `--version` prints.
    """
    return App(
        name=name,
        help=help,
        version=lambda: metadata.version(package),
        help_epilogue="Exit codes: 0 done, 1 a check failed, 2 bad input, 3 the machine failed (run the same command "
        "again), 70 a bug, 130 interrupted, 143 terminated. --debug shows where an error came from.",
        config=config_file.apply,
        result_action="return_value",
        exit_on_error=False,
        print_error=False,
        suppress_keyboard_interrupt=False,
    )


def main(app: App, tokens: Sequence[str] | None = None) -> int:
    """Runs an app as a console script and returns the exit code.

    Codes: what the command returns (0, or 1 for a failed check), 2 bad input, 3 the machine failed, 70 a bug,
    130 interrupted, 143 terminated. `--debug` shows the traceback of 2 and 3 as well.
    """
    tokens = list(sys.argv[1:] if tokens is None else tokens)
    debug = "--debug" in tokens
    tokens = [token for token in tokens if token != "--debug"]
    _set_environment(download="--download" in tokens)
    _set_logging(lambda message: with_flags(message, app, tokens))
    with _termination_raises():
        try:
            _check_options(app, tokens)
            code = app(tokens)
            code = code if isinstance(code, int) else 0
        except BaseException as error:
            code = _explain(error, debug, app, tokens)
        _flush()
    return code


def settings(**options: Any) -> dict[str, Any]:
    """Returns a command's resolved options as one flat dictionary: groups such as `Runtime` give their fields."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        if is_dataclass(value) and not isinstance(value, type):
            flat.update({field.name: getattr(value, field.name) for field in fields(value)})
        else:
            flat[name] = value
    return flat


def emit(result: Mapping[str, Any], as_json: bool = False) -> None:
    """Prints a result on standard output: one JSON object, or a line per figure.

    A reader that went away (`| head`) is no error.
    """
    plain = jsonable(result)
    if as_json:
        text = json.dumps(plain, allow_nan=False, indent=1)
    else:
        rows = list(_rows(plain))
        width = max((len(name) for name, _ in rows), default=0)
        text = "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _silence_stdout()


def show(run: "Run", output: Output, shown: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None) -> None:
    """Prints the result of a finished run and the place of its report or images, from the first process alone.

    Args:
        run: Run that is finished.
        output: Options that say whether the result is printed as JSON.
        shown: Selects from the result what is printed for people; by default all of it.
    """
    if not run.leading:
        return
    result = run.result
    emit(result if output.json or shown is None else shown(result), output.json)
    if (page := run.folder / "report.html").exists():
        print(f"report: {page}", file=sys.stderr)
    elif (images := run.folder / "figures").exists():
        print(f"images: {images}", file=sys.stderr)


def track(iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Yields the items and shows progress on standard error: a bar on a terminal, else a line every 30 seconds.

    Args:
        iterable: The items to go through.
        description: A few words for the progress bar, without text from files.
        total: Number of items, where `iterable` has no length.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        from rich.console import Console
        from rich.progress import track as rich_track

        yield from rich_track(iterable, description, total=total, console=Console(stderr=True), transient=True)
        return
    started = said = time.monotonic()
    for index, item in enumerate(iterable):
        if time.monotonic() - said > _PROGRESS_SECONDS:
            said = time.monotonic()
            of_total = f" of {total}" if total is not None else ""
            print(f"{description}: {index}{of_total}, {said - started:.0f} s", file=sys.stderr, flush=True)
        yield item


def _rows(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, item in value.items():
        if isinstance(item, Mapping):
            yield from _rows(item, f"{prefix}{name}.")
        else:
            limit = _SENTENCES if isinstance(item, str) else _LIST
            yield printable(f"{prefix}{name}", 200), printable(_figure(item), limit)


def _figure(item: Any) -> str:
    """Returns a value as people read it: short numbers, and lists of plain values without brackets."""
    if isinstance(item, float):
        return f"{item:.4g}"
    if isinstance(item, list | tuple) and not any(isinstance(value, list | tuple | Mapping) for value in item):
        return ", ".join(map(_figure, item)) or "none"
    return str(item)


def _set_environment(download: bool) -> None:
    # Before torch is imported: actively waiting OpenMP threads are many times slower on a busy machine. The hub library
    # reads its variables once, when it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = os.environ["DO_NOT_TRACK"] = "1"
    if not download:
        os.environ["HF_HUB_OFFLINE"] = "1"


class _StderrHandler(logging.StreamHandler):
    """Logs to the current `sys.stderr`, which may be replaced between commands that run in one process."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr  # not setStream, which would flush a stream that may be closed
        super().emit(record)


class _Formatter(logging.Formatter):
    def __init__(self, worded: Callable[[str], str]) -> None:
        super().__init__("%(message)s")
        self.worded = worded

    def format(self, record: logging.LogRecord) -> str:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return prefix + _safe(self.worded(super().format(record)))


def _set_logging(worded: Callable[[str], str]) -> None:
    handler = _StderrHandler()
    handler.setFormatter(_Formatter(worded))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.captureWarnings(True)
    # The place in our code that warns tells a user nothing.
    warnings.formatwarning = lambda message, *_, **__: str(message)
    logging.getLogger("diffcore").setLevel(logging.INFO)


@contextmanager
def _termination_raises() -> Iterator[None]:
    """Turns SIGTERM into SystemExit, so that with-blocks write what they hold."""

    def stop(*_: Any) -> None:
        raise SystemExit(TERMINATED)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: whoever runs us there handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_options(app: App, tokens: Sequence[str]) -> None:
    """Parses the command line once for its errors, among them the ValueErrors of settings."""
    try:
        app.parse_args(tokens)
    except ValueError as error:
        raise UserError(str(error)) from error


def with_flags(message: str, app: App, tokens: Sequence[str]) -> str:
    """Returns a message of the library with the parameters that it names in backticks as options of the command line.

    Names that are no options of the command only lose their backticks.

    Args:
        message: Text of an error or a warning.
        app: Console script that was called.
        tokens: Words of its command line, which name the command.

    Example:
        >>> app = make_app("demo", "Shows how messages are worded.", "diffcore")
        >>> @app.command
        ... def train(*, at_step: int = 1, strict: bool = False) -> None: ...
        >>> with_flags("`at_step` is 0 and `seed` is 1; leave out `strict=True`", app, ["train"])
        '--at-step is 0 and seed is 1; leave out --strict'
    """
    if "`" not in message:
        return message
    try:
        command = app.parse_commands(tokens)[1][-1]
        options = {name for argument in command.assemble_argument_collection() for name in argument.names}
    except (CycloptsError, IndexError):
        options = set()

    def flag(match: re.Match[str]) -> str:
        prefix = "--no-" if match[2] == "=False" else "--"
        names = [prefix + name.replace("_", "-") for name in (match[1], _RENAMED.get(match[1], match[1]))]
        return next((name for name in names if name in options), match[1] + (match[2] or ""))

    return re.sub(r"`([a-z][a-z0-9_]*)(=True|=False)?`", flag, message)


def _explain(error: BaseException, debug: bool, app: App, tokens: Sequence[str]) -> int:
    """Prints the error that ended a command and returns its exit code."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 0
    if isinstance(error, KeyboardInterrupt):
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        _silence_stdout()
        return 0
    error = _machine_error(error) or error
    if debug or not isinstance(error, UserError | MachineError | CycloptsError):
        traceback.print_exception(error)
    if isinstance(error, UserError | MachineError):
        _panel(with_flags(str(error), app, tokens))
        return error.exit_code
    if isinstance(error, CycloptsError):
        _panel(str(error))
        return UserError.exit_code
    print("this is a bug of ours: please report it with the lines above", file=sys.stderr)
    return BUG


def _machine_error(error: BaseException) -> MachineError | None:
    """Returns a `MachineError` for an error of the system or torch that memory or disk ran out; None for others."""
    if isinstance(error, OSError) and error.errno in files.MACHINE_ERRORS:
        return MachineError(f"{error}; what was finished is safe: run the same command again")
    if is_out_of_memory(error):
        first = printable(str(error).partition("\n")[0])
        return MachineError(f"out of memory ({first}); what was finished is safe: try a smaller --batch-size")
    return None


def _panel(message: str) -> None:
    message = _safe(message)
    if not sys.stderr.isatty():
        print(f"error: {message}", file=sys.stderr)  # one searchable line in logs, no box
        return
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    Console(stderr=True).print(Panel(Text(message), title="Error", title_align="left", border_style="red"))


def _safe(text: str) -> str:
    return "\n".join(printable(line, 10_000) for line in text.split("\n"))


def _flush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _silence_stdout()


def _silence_stdout() -> None:
    # What is still in the buffer goes to the null device, or Python complains at exit.
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
