"""Files of another format than their name states, above all pickles of plain numbers."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from diffcore.testing.malformed.case import WEIGHTS, Bases, Case, copied, replaced

_INDEX = f"{WEIGHTS}.index.json"


def disguise_cases() -> Iterator[Case]:
    """Yields pickles, archives and other formats in the place of weights and configurations."""
    for name, data in contents():
        yield Case(f"weights: {name}", "disguise", lambda b, f, d=data: _backbone(b, f, d()))
        yield Case(f"single file: {name}", "disguise", lambda b, f, d=data: _written(f / "model.safetensors", d()))
    for suffix in (".ckpt", ".pt", ".pth", ".bin", ".pkl"):
        yield Case(f"a {suffix}", "disguise", lambda b, f, s=suffix: _written(f / f"model{s}", _saved(7)))
        yield Case(
            f"a {suffix} that is allowed, with an object",
            "disguise",
            lambda b, f, s=suffix: _written(f / f"model{s}", _saved({"w": Fraction(1, 2)})),
            (("allow_pickle", True),),
        )
    for name, value in {
        "of a list": lambda: [torch.ones(2)],
        "of objects": lambda: {"w": {"nested": torch.ones(2)}},
        "of unknown layout": lambda: {"w": torch.ones(2)},
        "of a tensor larger than its bytes": lambda: {"w": torch.ones(1).expand(4, 4)},
        "of a sparse tensor": lambda: {"w": torch.eye(2).to_sparse()},
    }.items():
        yield Case(
            f"an allowed pickle {name}",
            "disguise",
            lambda b, f, v=value: _written(f / "model.ckpt", _saved(v())),
            (("allow_pickle", True),),
        )
    # An index can send a library to any file, of any kind: here none of them is there.
    for name, shard in {
        "a missing file of another kind": "missing.bin",
        "a missing file of another folder": "../missing.safetensors",
        "a missing file by its whole path": "/missing.safetensors",
        "a missing file with a colon": "missing:1.safetensors",
        "a missing file that begins with a dot": ".missing.safetensors",
        "a missing shard": "missing.safetensors",
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
    """Yields contents of other formats that may stand under the name of a weight file."""
    for protocol in range(6):
        yield f"a pickle of protocol {protocol}", lambda p=protocol: pickle.dumps(7, protocol=p)
    yield "a zipped checkpoint", lambda: _saved(7)
    yield "an old checkpoint", lambda: _saved(7, new=False)
    yield "a NumPy archive", _numpy_archive
    yield "a TorchScript program", lambda: _zip({"m/constants.pkl": b"\x80\x02.", "m/code/x.py": b"x = 1"})
    yield "an unknown zip", lambda: _zip({"x.txt": b"x"})
    yield "an object array", lambda: _object_array()
    yield "GGUF", lambda: b"GGUF" + bytes(60)
    yield "HDF5", lambda: b"\x89HDF\r\n\x1a\n" + bytes(60)
    yield "an HTML page", lambda: b"<!DOCTYPE html><p>Not found</p>" + bytes(20)
    yield "a Git-LFS pointer", lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    yield "a script", lambda: b"print(7)\n"
    yield "a header length like a pickle", lambda: b"\x80\x02\0\0\0\0\0\0" + pickle.dumps(7, protocol=2)


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
    replaced(model / _INDEX, json.dumps({"weight_map": weight_map}).encode())
    return model


def _only_bin(bases: Bases, folder: Path, file: str) -> Path:
    model = copied(bases.pipeline, folder)
    (model / file).unlink()
    replaced((model / file).with_name("pytorch_model.bin"), _saved(7))
    return model


def _pickled(bases: Bases, folder: Path, file: str) -> Path:
    model = copied(bases.pipeline, folder)
    replaced(model / file, pickle.dumps(7))
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
    np.save(buffer, np.array([7], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def _zip(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()
