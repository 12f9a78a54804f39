"""The record in a run folder: the settings that identify the run, the file that replays it, versions and hardware.

Nothing in it names a place on a disk, a user or a host.
"""

import os
import platform
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
import yaml

from diffcore.errors import RunMismatchError, printable
from diffcore.io import artifact, jsonfile

SCHEMA = "diffcore/run@1"
# Settings that change no result, so that a run may go on under other ones.
_VOLATILE = {"out", "json", "progress", "threads", "devices", "num_nodes", "strategy", "restart", "dry_run"}
_VOLATILE |= {"debug", "config"}


def identity_of(
    command: str, config: Mapping[str, Any], inputs: Mapping[str, str], volatile: Iterable[str]
) -> dict[str, Any]:
    """Returns the values that must stay equal for a run to go on: command, settings, digests of the inputs."""
    hidden = _VOLATILE | set(volatile)
    settings = {name: value for name, value in _flat(config) if name.rpartition(".")[2] not in hidden}
    return {
        "schema": SCHEMA,
        "command": command,
        "config": jsonfile.jsonable({name: _portable(value) for name, value in settings.items()}),
        "inputs": dict(inputs),
    }


def _flat(config: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _portable(value: Any) -> Any:
    """Returns a value without folders of files, whose content the digests among the inputs identify."""
    if isinstance(value, PurePath):
        return value.name
    if isinstance(value, str) and PurePath(value).is_absolute():
        return PurePath(value).name
    if isinstance(value, list | tuple):
        return [_portable(item) for item in value]
    return value


def require_same(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Compares the identity of the run in a folder with that of the command.

    Raises:
        RunMismatchError: The identities differ; the message lists up to ten fields.
    """
    before, now = (
        dict(_flat({"command": r["command"], "config": r["config"], "inputs": r["inputs"]})) for r in (old, new)
    )
    differing = [name for name in {**before, **now} if _given(before.get(name)) != _given(now.get(name))]
    if not differing:
        return
    lines = [
        f"  {printable(name.removeprefix('config.'))}: {_shown(before.get(name))} -> {_shown(now.get(name))}"
        for name in differing[:10]
    ]
    if len(differing) > 10:
        lines.append(f"  and {len(differing) - 10} more")
    raise RunMismatchError(
        "\n".join(
            [
                f"{printable(folder, 300)} holds a run of other settings:",
                *lines,
                "give another `folder`, or `restart=True` to keep the old run aside",
            ]
        )
    )


def _given(value: Any) -> Any:
    """Returns None for a flag that was not given: a version that does not have the flag records nothing."""
    return None if value is False else value


def _shown(value: Any) -> str:
    return "nothing" if value is None else printable(value, 24)


def replay_text(command: str, config: Mapping[str, Any]) -> str:
    """Returns the settings as YAML, without the run's own folder and paths outside the working folder."""
    settings, elsewhere = {}, []
    for name, value in config.items():
        if name in ("out", "json", "restart", "dry_run", "debug", "config"):
            continue
        if isinstance(value, PurePath | str) and PurePath(value).is_absolute():
            if not PurePath(value).is_relative_to(Path.cwd()):
                shown = printable(PurePath(value).name)
                elsewhere.append(f"# {name}: {shown} (outside the working folder; name it again)\n")
                continue
            value = PurePath(value).relative_to(Path.cwd()).as_posix()
        if value is not None:
            settings[name] = jsonfile.jsonable(value)
    head = f"# Settings of {command}; give this file as its option config to run it again.\n"
    return head + "".join(elsewhere) + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def versions(package: str) -> dict[str, str]:
    """Returns the versions of Python, the package, torch and related libraries that are installed."""
    names = dict.fromkeys((package, "diffcore", "torch", "numpy", "diffusers", "lightning"))
    found = {name: artifact.installed_version(name) for name in names}
    return {"python": platform.python_version(), **{name: version for name, version in found.items() if version}}


def hardware() -> dict[str, Any]:
    """Returns the kind of machine, without its name."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"machine": platform.machine(), "cores": os.cpu_count(), "gpu": gpu, "system": sys.platform}
