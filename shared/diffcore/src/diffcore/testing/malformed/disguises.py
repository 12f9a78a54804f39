"""Files that are not what their name says: pickles above all, each with a payload that would leave a trace."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from diffcore.testing.malformed.case import PAYLOAD, WEIGHTS, Bases, Case, Evil, copied, replaced

_INDEX = f"{WEIGHTS}.index.json"


def disguise_cases() -> Iterator[Case]:
    """Yields pickles, archives and other formats in the place of weights and configurations."""
    for name, data in contents():
        yield Case(f"weights: {name}", "disguise", lambda b, f, d=data: _backbone(b, f, d()))
        yield Case(f"single file: {name}", "disguise", lambda b, f, d=data: _written(f / "model.safetensors", d()))
    for suffix in (".ckpt", ".pt", ".pth", ".bin", ".pkl"):
        yield Case(f"a {suffix}", "disguise", lambda b, f, s=suffix: _written(f / f"model{s}", _saved(Evil())))
        yield Case(
            f"a {suffix} that is allowed, with a payload",
            "disguise",
            lambda b, f, s=suffix: _written(f / f"model{s}", _saved({"w": Evil()})),
            (("allow_pickle", True),),
        )
    for name, value in {
        "of a list": lambda: [torch.ones(2)],
        "of objects": lambda: {"w": {"nested": torch.ones(2)}},
        "of unknown layout": lambda: {"w": torch.ones(2)},
        "of a tensor larger than its bytes": lambda: {"w": torch.ones(1).expand(10**6, 10**6)},
        "of a sparse tensor": lambda: {"w": torch.eye(2).to_sparse()},
    }.items():
        yield Case(
            f"an allowed pickle {name}",
            "disguise",
            lambda b, f, v=value: _written(f / "model.ckpt", _saved(v())),
            (("allow_pickle", True),),
        )
    for name, shard in {
        "a pickle": "pytorch_model.bin",
        "a parent folder": "../dit/" + WEIGHTS,
        "an absolute path": "/etc/passwd",
        "an address": "https://example.org/x.safetensors",
        "a hidden file": ".x.safetensors",
        "a missing shard": "x.safetensors",
    }.items():
        yield Case(f"index names {name}", "disguise", lambda b, f, s=shard: _indexed(b, f, {"a": s}))
    yield Case("index without a map", "disguise", lambda b, f: _indexed(b, f, None))
    yield Case("index with an empty map", "disguise", lambda b, f: _indexed(b, f, {}))
    yield Case("index with numbers", "disguise", lambda b, f: _indexed(b, f, {"a": 7}))
    yield Case(
        "index of tensors elsewhere", "disguise", lambda b, f: _indexed(b, f, {"a": "s.safetensors"}, shard=True)
    )
    for part, file in {
        "backbone": f"unet/{WEIGHTS}",
        "autoencoder": f"vae/{WEIGHTS}",
        "text encoder": "text_encoder/model.safetensors",
    }.items():
        yield Case(f"{part} in a .bin alone", "disguise", lambda b, f, p=file: _only_bin(b, f, p))
    for file in ("model_index.json", "unet/config.json", "tokenizer/tokenizer.json", "scheduler/scheduler_config.json"):
        yield Case(f"{file} is a pickle", "disguise", lambda b, f, p=file: _pickled(b, f, p))


def contents() -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Yields what may hide behind the name of a weight file."""
    for protocol in range(6):
        yield f"a pickle of protocol {protocol}", lambda p=protocol: pickle.dumps(Evil(), protocol=p)
    yield "a zipped checkpoint", lambda: _saved({"w": Evil()})
    yield "an old checkpoint", lambda: _saved({"w": torch.ones(2)}, new=False)
    yield "a NumPy archive", _numpy_archive
    yield "a TorchScript program", lambda: _zip({"m/constants.pkl": b"\x80\x02.", "m/code/x.py": b"import os"})
    yield "an unknown zip", lambda: _zip({"x.txt": b"x"})
    yield "an object array", lambda: _object_array()
    yield "GGUF", lambda: b"GGUF" + bytes(60)
    yield "HDF5", lambda: b"\x89HDF\r\n\x1a\n" + bytes(60)
    yield "an HTML page", lambda: b"<!DOCTYPE html><script>alert(1)</script>" + bytes(20)
    yield "a Git-LFS pointer", lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    yield "a script", lambda: f"import os; os.system('touch {PAYLOAD}')\n".encode()
    yield "a header length like a pickle", lambda: b"\x80\x02\0\0\0\0\0\0" + pickle.dumps(Evil(), protocol=2)


def _backbone(bases: Bases, folder: Path, data: bytes) -> Path:
    model = copied(bases.backbone, folder)
    replaced(model / WEIGHTS, data)
    return model


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _indexed(bases: Bases, folder: Path, weight_map: object, *, shard: bool = False) -> Path:
    model = copied(bases.backbone, folder)
    weights = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).unlink()
    if shard:
        replaced(model / "s.safetensors", weights)
    replaced(model / "pytorch_model.bin", _saved({"a": torch.ones(2)}))
    replaced(model / _INDEX, json.dumps({"weight_map": weight_map}).encode())
    return model


def _only_bin(bases: Bases, folder: Path, file: str) -> Path:
    model = copied(bases.pipeline, folder)
    (model / file).unlink()
    replaced((model / file).with_name("pytorch_model.bin"), _saved({"w": Evil()}))
    return model


def _pickled(bases: Bases, folder: Path, file: str) -> Path:
    model = copied(bases.pipeline, folder)
    replaced(model / file, pickle.dumps(Evil()))
    return model


def _saved(value: object, *, new: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


def _numpy_archive() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, w=np.ones(3))
    return buffer.getvalue()


def _object_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Evil()], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def _zip(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()
