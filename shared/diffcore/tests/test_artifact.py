import json
import math
import os
import random
import resource
import signal
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from diffcore.errors import CorruptArtifactError, MachineError, UserError
from diffcore.io import artifact, files
from diffcore.io.jsonfile import jsonable, read_json, write_json, write_text
from diffcore.testing.disk import Killed, faulty_disk
from diffcore.testing.distributed import run_forked
from diffcore.testing.sockets import make_socket

SCHEMA = "diffcore/thing@2"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


def save(folder: Path, **fields):
    return artifact.save(folder / "thing", {"x": torch.arange(1000.0)}, schema=SCHEMA, **fields)


def test_everything_comes_back(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {str(d): torch.ones(2, 3).to(d) for d in DTYPES}
    tensors |= {
        "shared": base,
        "view": base[1:3],
        "transposed": base.T,
        "empty": torch.empty(0, 3),
        "0d": torch.eye(1)[0, 0],
    }
    path = artifact.save(
        tmp_path / "thing", tensors, schema=SCHEMA, name="ä \ud800", score=0.1, worst=math.nan, n=[1, 2]
    )
    found = artifact.load(path, schema=SCHEMA)
    assert path.name == "thing.safetensors"
    assert set(found.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)
    assert found.fields == {"name": "ä \ud800", "score": 0.1, "worst": None, "n": [1, 2]}
    assert found.schema == SCHEMA
    assert found.produced_by.startswith("diffcore ")
    assert found.created.endswith("+00:00")
    with safe_open(path, "pt") as stray:
        assert stray.metadata() == {"schema": SCHEMA}


def test_same_tensors_same_bytes(tmp_path):
    tensors = {name: torch.full((3,), float(i)) for i, name in enumerate("badc")}
    paths = [artifact.save(tmp_path / str(i), tensors, schema=SCHEMA) for i in range(8)]
    assert len({path.read_bytes() for path in paths}) == 1


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.text(st.characters(codec="utf-8"), min_size=1), st.integers(0, 5), max_size=4),
    st.dictionaries(
        st.text(min_size=1).filter(lambda name: name not in artifact._OWN),
        st.recursive(
            st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(), lambda inner: st.lists(inner, max_size=3), max_leaves=5,
        ),
        max_size=4,
    ),
)  # fmt: skip
def test_any_names_and_fields_come_back(tmp_path_factory, names, fields):
    fields = {k: v for k, v in fields.items() if k not in ("path", "tensors", "schema")}
    folder = tmp_path_factory.mktemp("a")
    tensors = {name: torch.arange(float(n)) for name, n in names.items() if name != "__metadata__"}
    with faulty_disk():
        found = artifact.load(artifact.save(folder / "t", tensors, schema=SCHEMA, **fields))
    assert found.fields == fields
    assert {name: len(tensor) for name, tensor in found.tensors.items()} == {name: names[name] for name in tensors}


def test_mode_follows_the_umask_and_no_temporary_stays(tmp_path):
    before = os.umask(0o027)
    try:
        path = save(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thing.json", "thing.safetensors"]


@pytest.mark.parametrize("kind", ["symlink", "folder", "socket"])
def test_only_regular_files_are_replaced(tmp_path, kind):
    target = tmp_path / "thing.safetensors"
    if kind == "symlink":
        (tmp_path / "elsewhere").write_bytes(b"mine")
        target.symlink_to(tmp_path / "elsewhere")
    elif kind == "folder":
        target.mkdir()
    else:
        make_socket(target)
    with pytest.raises(UserError, match="not a regular file"):
        save(tmp_path)
    if kind == "symlink":
        assert (tmp_path / "elsewhere").read_bytes() == b"mine"


@pytest.mark.parametrize("seed", range(60))
def test_no_damage_passes_for_right(tmp_path, seed):
    rng = random.Random(seed)
    with faulty_disk():
        path = save(tmp_path, score=0.5)
        victim = rng.choice([path, path.with_suffix(".json")])
        data = bytearray(victim.read_bytes())
        way = rng.choice(["flip", "truncate", "delete", "zero"])
        if way == "delete":
            victim.unlink()
        else:
            at = rng.randrange(len(data))
            if way == "flip":
                data[at] ^= 1 << rng.randrange(8)
            elif way == "truncate":
                del data[at:]
            else:
                data[at:] = bytes(len(data) - at)
            if bytes(data) == victim.read_bytes():
                return
            victim.write_bytes(data)
        if victim.suffix == ".json" and way == "truncate" and data.strip() == data[:-1].strip() + b"}":
            return  # only the newline at the end is gone
        with pytest.raises(CorruptArtifactError, match="thing"):
            artifact.load(path, schema=SCHEMA)


def test_size_is_always_compared_and_the_sum_on_request(tmp_path):
    path = save(tmp_path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert artifact.load(path, verify=False).tensors["x"][:-1].equal(torch.arange(999.0))
    with pytest.raises(CorruptArtifactError, match="sum"):
        artifact.load(path)
    path.write_bytes(data[:-4])
    with pytest.raises(CorruptArtifactError, match="bytes where its sidecar says"):
        artifact.load(path, verify=False)


def test_schemas(tmp_path):
    path = save(tmp_path)
    assert artifact.load(path, schema="diffcore/thing@3").schema == SCHEMA  # older ones are read
    with pytest.raises(CorruptArtifactError, match=r"written by diffcore .*; update to read it"):
        artifact.load(path, schema="diffcore/thing@1")
    with pytest.raises(CorruptArtifactError, match="is a diffcore/thing where a diffcore/other is needed"):
        artifact.load(path, schema="diffcore/other@2")
    for bad in ("thing@1", "diffcore/thing", "diffcore/thing@0", "Diffcore/thing@1", "../x@1"):
        with pytest.raises(ValueError, match="no schema"):
            artifact.save(tmp_path / "x", {}, schema=bad)
    with pytest.raises(ValueError, match="'bytes'"):
        save(tmp_path, bytes=3)


# -- disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["full", "broken", "read-only"])
def test_machine_faults_keep_the_old_artifact_and_say_what_is_needed(tmp_path, fault):
    path = save(tmp_path)
    golden = path.read_bytes()
    with faulty_disk() as disk:
        save(tmp_path)
    for at in range(1, disk.count + 1):
        with faulty_disk(at, fault), pytest.raises(MachineError, match=r"thing\..* bytes needed, ") as caught:
            save(tmp_path)
        assert caught.value.exit_code == 3
        assert path.read_bytes() == golden
        assert artifact.load(path).schema == SCHEMA  # the same tensors: either sidecar vouches for them
    with faulty_disk():
        assert [p.name for p in files.sweep(tmp_path)] == []


def test_a_sidecar_never_promises_what_is_not_there(tmp_path):
    with faulty_disk() as disk:
        save(tmp_path / "golden")
    for at in range(1, disk.count + 1):
        folder = tmp_path / str(at)
        with faulty_disk(at, "killed"), pytest.raises(Killed):
            save(folder)
        if (folder / "thing.json").exists():
            assert len(artifact.load(folder / "thing").tensors["x"]) == 1000


def test_a_real_file_size_limit(tmp_path):
    """As a full disk, by the system itself: writing beyond the limit fails with EFBIG."""
    path = save(tmp_path)

    def work(_):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        try:
            artifact.save(tmp_path / "thing", {"x": torch.zeros(1_000_000)}, schema=SCHEMA)
        except MachineError as error:
            return str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    (message,) = run_forked(work, ranks=1)
    assert "File too large (4,000," in message
    assert len(artifact.load(path).tensors["x"]) == 1000
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thing.json", "thing.safetensors"]


def test_missing_place_and_file_in_the_way_are_the_users(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Not a directory|File exists"):
        save(tmp_path / "file" / "below")
    with pytest.raises(CorruptArtifactError, match="missing"):
        artifact.load(tmp_path / "none")


# -- JSON -----------------------------------------------------------------------------------------------------


def test_json_is_valid_and_strict(tmp_path):
    value = {
        "a": math.inf,
        "b": [math.nan, 1.5],
        "c": np.float32(2),
        "d": torch.eye(2),
        "e": Path("x/y"),
        "f": "\ud800",
    }
    path = write_json(tmp_path / "a.json", value)
    expected = {"a": None, "b": [None, 1.5], "c": 2.0, "d": [[1, 0], [0, 1]], "e": "x/y", "f": "\ud800"}
    assert read_json(path) == json.loads(path.read_text()) == expected
    with pytest.raises(TypeError, match="set has no JSON form"):
        jsonable({"a": {1}})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not valid JSON"),
        ("{", "is not valid JSON"),
        ('{"a": NaN}', "holds NaN"),
        ('{"a": 1e999}', "holds 1e999"),
        ('{"a": 1, "a": 2}', "gives the key 'a' twice"),
        ("[" * 100_000, "nests deeper than 64"),
        ('{"a": "\x00"}', "is not valid JSON"),
        ("\x80", "is not UTF-8"),
        ("{} {}", "is not valid JSON"),
    ],
)
def test_bad_json_is_named(tmp_path, text, reason):
    path = tmp_path / "bad.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(CorruptArtifactError, match=f"bad.json {reason}"):
        read_json(path)


def test_huge_json_is_refused(tmp_path):
    path = write_text(tmp_path / "huge.json", '"' + "x" * 10_000_001 + '"')
    with pytest.raises(CorruptArtifactError, match="10,000,003 bytes"):
        read_json(path)
