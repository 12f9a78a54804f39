"""The gate's readers: strict where the libraries are lenient, and never more lenient than they are."""

import json
import os
import stat
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file

from diffcore.checkpoint import inspect_model
from diffcore.checkpoint.walk import walk
from diffcore.errors import IncompatibleModelError, ModelNotFoundError
from diffcore.io import strictjson, tensorfile
from diffcore.io.strictjson import StrictError, parse, read_untrusted
from diffcore.io.tensorfile import read_header, what_it_is
from diffcore.models import load
from diffcore.runtime import Runtime
from diffcore.testing import tiny
from diffcore.testing.checkpoints import sharded
from diffcore.testing.sockets import make_socket

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
NAMES = st.text("abc._-0 ~!", min_size=1, max_size=8)
SHAPES = st.lists(st.integers(1, 3), max_size=4)
FEW = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def library_reads(data: bytes) -> bool:
    import safetensors

    try:
        safetensors.deserialize(data)
    except SafetensorError:
        return False
    return True


def ours_reads(path) -> bool:
    try:
        read_header(path)
    except IncompatibleModelError:
        return False
    return True


@FEW
@given(st.dictionaries(NAMES, st.tuples(st.sampled_from(DTYPES), SHAPES), max_size=5), st.booleans())
def test_headers_say_what_was_saved(tmp_path, tensors, with_metadata):
    saved = {name: torch.zeros(shape, dtype=dtype) for name, (dtype, shape) in tensors.items()}
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(saved, {"by": "hypothesis"} if with_metadata else None))
    header = read_header(path)
    assert header.size == path.stat().st_size
    assert header.metadata == ({"by": "hypothesis"} if with_metadata else {})
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == header.tensors.keys()
        for name, entry in header.tensors.items():
            assert entry.shape == tuple(file.get_slice(name).get_shape())
            assert entry.dtype == file.get_slice(name).get_dtype()


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 70) | st.floats() | st.sampled_from(["F32", "F16", "U8", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), inner)
    ),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "U8", "BOOL", "F4", "C64", "E8M0"]),
        "shape": st.lists(st.integers(0, 3), max_size=3),
        "data_offsets": st.tuples(st.integers(0, 12), st.integers(0, 24)).map(list),
    }
)


@FEW
@given(
    st.dictionaries(st.sampled_from(["a", "b", "__metadata__", ""]), ENTRIES | JSON_VALUES, max_size=3),
    st.integers(0, 24),
    st.sampled_from(["", " ", "x", "{}"]),
)
def test_what_the_library_rejects_is_rejected(tmp_path, header, size, tail):
    text = (json.dumps(header) + tail).encode()
    data = struct.pack("<Q", len(text)) + text + bytes(size)
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    if ours_reads(path):
        assert library_reads(data)


@FEW
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(-2, 2)), min_size=1, max_size=4), st.integers(-2, 2))
def test_holes_and_overlaps_are_judged_as_by_the_library(tmp_path, tensors, rest):
    header, end = {}, 0
    for index, (size, gap) in enumerate(tensors):
        start = max(end + (gap if gap in (-1, 1) else 0), 0)
        end = start + size
        header[f"t{index}"] = {"dtype": "U8", "shape": [size], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text)) + text + bytes(max(end + (rest if rest in (-1, 1) else 0), 0))
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    assert ours_reads(path) == library_reads(data)


def test_mutated_files_are_never_accepted_against_the_library(tmp_path):
    random = np.random.default_rng(0)
    seeds = [
        save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.int64)}, {"k": "v"}),
        save({f"layer.{i}.weight": torch.ones(i + 1, dtype=torch.float16) for i in range(4)}),
    ]
    path = tmp_path / "x.safetensors"
    accepted = 0
    for _ in range(500):
        data = bytearray(seeds[random.integers(2)])
        (length,) = struct.unpack("<Q", data[:8])
        for _ in range(random.integers(1, 4)):
            position = int(random.integers(8 + length))
            data[position] = random.integers(256) if random.random() < 0.5 else random.choice(list(b'[]{},:"019 -.e'))
        if random.random() < 0.2:
            data = data[: random.integers(len(data))]
        path.write_bytes(data)
        if ours_reads(path):
            accepted += 1
            assert library_reads(bytes(data))
    assert accepted > 5  # flips inside names are harmless


@pytest.mark.parametrize(("limit", "value"), [("MAX_TENSORS", 3), ("MAX_HEADER_BYTES", 100)])
def test_header_limits(tmp_path, monkeypatch, limit, value):
    save_file({f"t{i}": torch.ones(1) for i in range(4)}, tmp_path / "x.safetensors")
    assert len(read_header(tmp_path / "x.safetensors").tensors) == 4
    monkeypatch.setattr(tensorfile, limit, value)
    with pytest.raises(IncompatibleModelError, match="limit is"):
        read_header(tmp_path / "x.safetensors")


def test_empty_tensors_are_no_weights(tmp_path):
    save_file({"a": torch.ones(0, 3), "b": torch.ones(2)}, tmp_path / "x.safetensors")
    assert read_header(tmp_path / "x.safetensors").tensors["a"].shape == (0, 3)
    tiny.backbone("dit").save_pretrained(tmp_path / "dit")
    weights = tmp_path / "dit" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(weights) | {"pos_embed.proj.bias": torch.ones(0)}, weights)
    with pytest.raises(IncompatibleModelError, match=r"'pos_embed\.proj\.bias' of shape \[0\], where"):
        load(tmp_path / "dit", Runtime(device="cpu"))


def test_a_header_length_that_looks_like_a_pickle_is_no_pickle(tmp_path):
    text = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode().ljust(640)
    data = struct.pack("<Q", 640) + text + b"\0"
    assert data[:2] == b"\x80\x02"  # protocol 2
    (tmp_path / "x.safetensors").write_bytes(data)
    assert read_header(tmp_path / "x.safetensors").tensors["a"].shape == (1,)
    assert what_it_is(tmp_path / "x.safetensors") == "a pickle"  # therefore it is asked last


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"a": 1, "a": 1}', "gives the key 'a' twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": 1e999}', "not finite"),
        (b'{"a": 9007199254740993}', "beyond 2"),
        (b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}", "deeper than 64"),
        (b"[" * 10_000_000, "deeper than 64"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": }', "not valid JSON"),
    ],
)
def test_json_that_python_takes_or_breaks_on(text, reason):
    with pytest.raises(StrictError, match=reason):
        parse(text)


def test_depth_ignores_brackets_in_strings_and_is_linear():
    assert parse(b'{"a": "' + b"[" * 100 + b'", "b": "\\"[[["}')["b"] == '"[[['
    assert parse(b"[" * 64 + b"]" * 64)
    with pytest.raises(StrictError):
        parse(b'"' + b'\\"' * 2_000_000)  # quadratic readers would need hours


@FEW
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**53), 2**53)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
        max_leaves=10,
    )
)
def test_ordinary_json_is_read_as_by_python(value):
    text = json.dumps(value).encode()
    assert parse(text) == json.loads(text)


def test_large_files_are_not_read(tmp_path, monkeypatch):
    (tmp_path / "x.json").write_bytes(b'{"a": 1}' + b" " * 100)
    assert read_untrusted(tmp_path / "x.json") == {"a": 1}
    with pytest.raises(IncompatibleModelError, match="the limit is 50"):
        read_untrusted(tmp_path / "x.json", max_bytes=50)
    assert strictjson.MAX_BYTES == 10_000_000


def test_a_walk_is_sorted_and_takes_links_to_files(tmp_path):
    (tmp_path / "model" / "b").mkdir(parents=True)
    (tmp_path / "blob").write_bytes(b"12345")
    (tmp_path / "model" / "b" / "x").write_bytes(b"1")
    (tmp_path / "model" / "a").symlink_to("../blob")
    assert list(walk(tmp_path / "model").items()) == [("a", 5), ("b/x", 1)]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gate") / "dit"
    tiny.backbone("dit").save_pretrained(folder)
    return folder


def test_an_inventory_counts_what_is_there(backbone):
    found = inspect_model(backbone)
    assert (found.layout, found.class_name) == ("component", "DiTTransformer2DModel")
    assert found.num_tensors == len(tiny.backbone("dit").state_dict())
    assert found.num_bytes == (backbone / "diffusion_pytorch_model.safetensors").stat().st_size
    assert found.components["backbone"].config["num_layers"] == 2
    assert not any(key.startswith("_") for key in found.components["backbone"].config)
    assert found.warnings == ()


def test_a_folder_of_links_is_a_folder(backbone, tmp_path):
    for file in backbone.iterdir():
        os.symlink(file, tmp_path / file.name)
    assert inspect_model(tmp_path).num_tensors == inspect_model(backbone).num_tensors
    assert inspect_model(str(tmp_path)).class_name == "DiTTransformer2DModel"


def test_all_missing_shards_are_listed(backbone, tmp_path):
    import shutil

    folder = shutil.copytree(backbone, tmp_path / "dit")
    sharded(folder, "diffusion_pytorch_model", 4)
    assert len(inspect_model(folder).components["backbone"].weights) == 4
    for part in (2, 3):
        (folder / f"diffusion_pytorch_model-{part:05d}-of-00004.safetensors").unlink()
    with pytest.raises(IncompatibleModelError, match=r"-00002-of-00004.*-00003-of-00004"):
        inspect_model(folder)


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        (
            "owner/name",
            ModelNotFoundError,
            "'owner/name' is not a folder here; `download=True` fetches it from the hub",
        ),
        ("no/such/folder", ModelNotFoundError, "no/such/folder does not exist; point to a model folder or file"),
    ],
)
def test_what_is_not_here(source, kind, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind) as caught:
        inspect_model(source)
    assert str(caught.value) == message


def test_a_pickle_is_refused_by_its_name_alone(tmp_path):
    (tmp_path / "m.ckpt").write_bytes(b"")
    with pytest.raises(IncompatibleModelError) as caught:
        inspect_model(tmp_path / "m.ckpt")
    assert str(caught.value) == (
        f"{tmp_path}/m.ckpt is a pickle, which can run code when read; convert it to safetensors, "
        "or pass `allow_pickle=True` if you trust its author"
    )
    assert inspect_model(tmp_path / "m.ckpt", allow_pickle=True).layout == "pickle"


def test_the_gate_needs_no_torch():
    import subprocess
    import sys

    code = "import sys; import diffcore.checkpoint.inspect; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("kind", "name"), [(stat.S_IFIFO, "a pipe"), (stat.S_IFBLK, "a device"), (0, "no regular file")]
)
def test_what_is_no_file_is_called_what_it_is(tmp_path, monkeypatch, kind, name):
    """Reading a pipe waits for whoever writes into it: a socket stands for it, and the system's answer is made up."""
    make_socket(tmp_path / "odd")
    monkeypatch.setattr(stat, "S_IFMT", lambda mode: kind)
    with pytest.raises(IncompatibleModelError, match=f"holds odd, which is {name}"):
        walk(tmp_path)
