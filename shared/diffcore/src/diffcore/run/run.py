"""A resumable run: one folder that holds settings, finished parts, tables, figures and the result.

The same command in the same folder goes on where it stopped; other settings in the same folder are refused.
"""

import hashlib
import io
import logging
import os
import re
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from filelock import FileLock, Timeout
from torch import Tensor

from diffcore.errors import CorruptArtifactError, MachineError, UserError, printable
from diffcore.io import artifact, files, jsonfile, tables
from diffcore.run.record import SCHEMA, hardware, identity_of, replay_text, require_same, versions

_LOG = logging.getLogger(__name__)
_PART = "diffcore/part@1"
_RECENT_SECONDS = 3600


@runtime_checkable
class Savable(Protocol):
    """An object that can write itself as an image file, such as a matplotlib figure."""

    def savefig(self, fname: Any, **options: Any) -> Any:
        """Writes the image."""


class Run:
    """A run folder; open it with `Run.open`, as a context manager.

    Attributes:
        folder: The folder that holds the run.
        finished: Whether the run was finished when it was opened, or has been since.
    """

    def __init__(self, folder: Path, record: dict[str, Any], lock: FileLock | None) -> None:
        self.folder = folder
        self.finished = record["status"] == "finished"
        self._record = record
        self._lock = lock
        self._started = time.monotonic()
        self._seconds_before = record["seconds"]

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        command: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, str] | None = None,
        restart: bool = False,
        volatile: Iterable[str] = (),
    ) -> "Run":
        """Opens a run folder, new or to be resumed, and locks it against other processes.

        Stale temporary files are deleted; damaged parts are logged, deleted and computed again. In a job of several
        processes only the first locks and writes the record.

        Args:
            folder: The run folder; it is made if it does not exist.
            command: Console script and verb, such as `immiscible-noise train`.
            config: Settings of the command after defaults are filled in.
            inputs: The sha256 of each input by name; see `input_hash`.
            restart: Whether a folder that exists is renamed to `NAME.old-N` and the run starts anew.
            volatile: Names in `config` that do not change the results, such as `batch_size`.

        Raises:
            RunMismatchError: The folder holds a run of another command, other settings or other inputs.
            MachineError: Another process has the folder, or the disk fails.
            UserError: The folder is a file, cannot be written, or holds files that no run made.
        """
        folder = Path(folder)
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{printable(folder, 300)} is a file; give another `folder`")
        with files.explained(folder):
            files.make_folder(folder)
        identity = identity_of(command, config, inputs or {}, volatile)
        if _rank() > 0:
            return cls(folder, {**identity, "status": "running", "seconds": 0.0}, None)
        _refuse_foreign(folder)
        lock = _locked(folder)
        try:
            if restart and (folder / "run.json").exists():
                lock = _set_aside(folder, lock)
            record = _resume(folder, identity) or _begin(folder, identity)
            if not (folder / "config.yaml").exists():  # on resuming too: a crash may have come before it
                jsonfile.write_text(folder / "config.yaml", replay_text(command, config))
            run = cls(folder, record, lock)
            run._repair()
            return run
        except BaseException:
            lock.release()
            raise

    @classmethod
    def reopen(cls, folder: Path) -> "Run":
        """Opens a folder under the settings that it already has: for reading it, or making its report again.

        Raises:
            UserError: The folder holds no run.
            MachineError: Another process has it.
        """
        folder = Path(folder)
        if not (folder / "run.json").is_file():
            raise UserError(f"{printable(folder, 300)} holds no run; give a folder that a command wrote")
        record = jsonfile.read_trusted(folder / "run.json")
        command, config, inputs = (record.get(name, {}) for name in ("command", "config", "inputs"))
        return cls.open(folder, command=command, config=config, inputs=inputs)

    @property
    def leading(self) -> bool:
        """Whether this process writes results: the only one, or the first of several."""
        return _rank() == 0

    @property
    def record(self) -> dict[str, Any]:
        """The content of `run.json`: command, settings, inputs, versions, seed, hardware, status."""
        return dict(self._record)

    @property
    def result(self) -> dict[str, Any]:
        """The summary of a finished run.

        Raises:
            CorruptArtifactError: There is none.
        """
        return jsonfile.read_trusted(self.folder / "result.json")

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Returns the keys without a finished part, in their order.

        Raises:
            ValueError: A key is given twice.
        """
        keys = list(keys)
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"{printable(twice)!r} is given twice; keys name units of work")
        done = {path.stem for path in (self.folder / "parts").glob("*.json")}
        return [key for key in keys if _file_name(key) not in done]

    def has(self, key: str) -> bool:
        """Returns whether the part of a key is finished."""
        return not self.missing([key])

    def save(self, key: str, tensors: Mapping[str, Tensor], **meta: Any) -> Path:
        """Writes a finished part; when it returns, the part survives a power cut."""
        return artifact.save(self._part(key), tensors, schema=_PART, key=key, **meta)

    def load(self, key: str) -> artifact.Artifact:
        """Reads a finished part.

        Raises:
            CorruptArtifactError: The part is missing, damaged, or belongs to another key.
        """
        part = artifact.load(self._part(key), schema=_PART)
        if part.fields.get("key") != key:
            raise CorruptArtifactError(f"{self._part(key)} is another part's file; delete it and run the command again")
        return part

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
        """Writes `tables/NAME.csv`; text that a spreadsheet would take for a formula is quoted.

        Where that changed a cell, `tables/NAME.jsonl` holds the exact text. `read_table` undoes it.
        """
        path = self.folder / "tables" / f"{name}.csv"
        jsonfile.write_text(path, tables.csv_text(rows))
        if tables.has_guarded(rows):
            jsonfile.write_text(path.with_suffix(".jsonl"), "".join(map(jsonfile.json_line, rows)))
        return path

    def keep_table(self, name: str, rows: Sequence[Mapping[str, Any]], caption: str) -> None:
        """Keeps a table for the report, which `Report.kept_table` adds, and writes it as `table` does."""
        self.save(f"table-{name}", {}, rows=[dict(row) for row in rows], caption=caption)
        self.table(name, rows)

    def figure(self, name: str, figure: Savable) -> Path:
        """Writes `figures/NAME.png` at 150 dpi, the same bytes for the same figure."""
        path = self.folder / "figures" / f"{name}.png"
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=150, metadata={"Software": None})
        files.write_whole(path, picture.getvalue())
        return path

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Writes `result.json` and marks the run finished."""
        if _rank() > 0:
            return
        jsonfile.write_json(self.folder / "result.json", summary)
        self._record["summary"] = jsonfile.jsonable(summary)
        self._set_status("finished")
        self.finished = True

    def close(self) -> None:
        """Releases the lock on the folder."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if not self.finished and _rank() == 0:
                failed = kind is not None and issubclass(kind, Exception)
                self._set_status("failed" if failed else "interrupted")
        except (MachineError, UserError):
            if error is None:
                raise
            _LOG.warning("the status in run.json could not be written")  # the first error is the one to show
        finally:
            self.close()

    def _part(self, key: str) -> Path:
        return self.folder / "parts" / f"{_file_name(key)}.safetensors"

    def _set_status(self, status: str) -> None:
        self._record["status"] = status
        self._record["seconds"] = round(self._seconds_before + time.monotonic() - self._started, 3)
        jsonfile.write_json(self.folder / "run.json", self._record)

    def _repair(self) -> None:
        for path in files.sweep(self.folder):
            _LOG.info("deleted %s, left by an interrupted write", printable(path.name))
        dropped = _drop_damaged_parts(self.folder / "parts") + _drop_damaged_results(self.folder)
        if self.finished and not dropped:
            try:
                _ = self.result
                return
            except CorruptArtifactError as error:
                _LOG.warning("%s", error)
        self.finished = False
        self._set_status("running")


def input_hash(path: Path) -> str:
    """Returns the digest that identifies an input: the sha256 of a file, or of a folder's list of files.

    A folder's list has, in order of name, each file's relative name, size, and the sha256 of its first and last MiB.

    Raises:
        UserError: There is no such file or folder, or it cannot be read.
    """
    path = Path(path)
    if path.is_file():
        return files.sha256(path)
    if not path.is_dir():
        raise UserError(f"{printable(path, 300)} is neither a file nor a folder; check the path")
    digest = hashlib.sha256()
    for member in sorted(p for p in path.rglob("*") if p.is_file()):
        name = member.relative_to(path).as_posix()
        digest.update(f"{name!r} {member.stat().st_size} {files.sha256_of_ends(member)}\n".encode())
    return digest.hexdigest()


def _file_name(key: str) -> str:
    if re.fullmatch(r"[a-z0-9_-][a-z0-9._-]{0,79}", key):
        return key
    safe = re.sub(r"[^a-z0-9._-]", "_", key)[:40].lstrip(".") or "_"
    return f"{safe}-{hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}"


def _rank() -> int:
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return 0


def _refuse_foreign(folder: Path) -> None:
    """Raises UserError for a folder that holds files but no run; leaves nothing in it."""
    if (folder / "run.json").exists():
        return
    foreign = sorted(p.name for p in folder.iterdir() if p.name != "run.lock" and not p.name.endswith(".tmp"))
    if foreign:
        raise UserError(
            f"{printable(folder, 300)} holds files that are not of a run ({printable(foreign[0])}); "
            "give an empty or a new `folder`"
        )


def _locked(folder: Path) -> FileLock:
    path = folder / "run.lock"
    lock = FileLock(path, blocking=False)
    with files.explained(path):
        try:
            lock.acquire()
        except Timeout:  # an OSError by descent, which is not what it means here
            raise MachineError(
                f"{printable(folder, 300)} is in use {_holder(path)}; wait for it, or give another `folder`"
            ) from None
    with files.explained(path):
        path.write_text(f"{os.getpid()}\n{socket.gethostname()}\n{artifact.utc_now()}\n", encoding="utf-8")
    return lock


def _holder(path: Path) -> str:
    try:
        pid, host, since = path.read_text(encoding="utf-8").split("\n")[:3]
    except (OSError, ValueError):  # it has just been taken, nothing is written yet
        return "by another process"
    return f"by pid {printable(pid)} on {printable(host)} since {printable(since)}"


def _set_aside(folder: Path, lock: FileLock) -> FileLock:
    number = 1
    while (old := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    with files.explained(old):
        files.replace(folder, old)
        files.make_folder(folder)
    lock.release()
    _LOG.info("the old run is now %s", printable(old, 300))
    return _locked(folder)


def _resume(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    path = folder / "run.json"
    if not path.exists():
        return None
    record = jsonfile.read_trusted(path)
    known = {"schema", "command", "config", "inputs", "status", "seconds"}
    if record.get("schema") != SCHEMA or not known <= set(record):
        raise CorruptArtifactError(
            f"{printable(path, 300)} was written by {printable(record.get('produced_by'))}; update to read it, "
            "or give another `folder`"
        )
    require_same(folder, record, identity)
    return record


def _begin(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    package = str(identity["command"]).split()[0]
    record = {
        **identity,
        "produced_by": artifact.produced_by(package),
        "versions": versions(package),
        "seed": identity["config"].get("seed"),
        "hardware": hardware(),
        "created": artifact.utc_now(),
        "status": "running",
        "seconds": 0.0,
        "summary": None,
    }
    jsonfile.write_json(folder / "run.json", record)
    return record


def _drop_damaged_parts(folder: Path) -> list[str]:
    """Deletes parts that do not verify, and returns their names."""
    dropped = []
    for stem in sorted({path.stem for path in folder.glob("*") if path.suffix in (".json", ".safetensors")}):
        path = folder / f"{stem}.safetensors"
        try:
            sidecar = artifact.check(path, verify=_is_recent(path))
            if _file_name(str(sidecar.get("key"))) != stem:
                raise CorruptArtifactError(f"{stem} is another part's file")
        except CorruptArtifactError as error:
            _drop(path, error)
            dropped.append(stem)
    return dropped


def _drop_damaged_results(folder: Path) -> list[str]:
    """Deletes results that do not match diffcore's sidecar beside them; files without one stay."""
    dropped = []
    for sidecar in sorted(folder.glob("*.json")):
        try:
            if "sidecar_sha256" in jsonfile.read_json(sidecar):
                artifact.check(sidecar, verify=False)
        except CorruptArtifactError as error:
            if sidecar.stem in ("run", "result") or not sidecar.with_suffix(".safetensors").exists():
                continue
            _drop(sidecar.with_suffix(".safetensors"), error)
            dropped.append(sidecar.stem)
    return dropped


def _drop(path: Path, error: CorruptArtifactError) -> None:
    _LOG.warning("dropped %s: %s", printable(path.stem), printable(error, 200))
    with files.explained(path):
        files.remove(path.with_suffix(".json"))  # first, or a crash here would leave a sidecar alone
        files.remove(path)


def _is_recent(path: Path) -> bool:
    return not path.exists() or time.time() - path.stat().st_mtime < _RECENT_SECONDS
