import os
import subprocess
import sys

import pytest
import torch

from diffcore.errors import MissingDependencyError, UserError
from diffcore.noise import row_noise
from diffcore.runtime import Runtime, default_threads


def test_defaults_resolve():
    runtime = Runtime()
    assert runtime.torch_device.type in ("cpu", "cuda", "mps")
    assert runtime.torch_dtype == torch.float32
    assert Runtime(device="cpu", dtype="bfloat16").torch_dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"num_nodes": 0}, "`num_nodes` is 0"),
        ({"devices": 0}, "`devices`"),
        ({"num_nodes": -1}, "`num_nodes`"),
        ({"threads": 0}, "`threads`"),
        ({"seed": -1}, "`seed`"),
        ({"device": "cpu", "dtype": "float16"}, "bfloat16"),
    ],
)
def test_bad_values_are_refused_with_the_option_named(fields, word):
    with pytest.raises(UserError, match=word):
        Runtime(**fields)


def test_auto_without_accelerator_refuses_float16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="bfloat16"):
        _ = Runtime(dtype="float16").torch_dtype
    with pytest.raises(UserError, match="no 'cuda' device"):
        _ = Runtime(device="cuda").torch_device


def test_generator_is_the_rows_own():
    runtime = Runtime(seed=4)
    drawn = torch.randn(9, generator=runtime.generator(17, stream=2))
    assert torch.equal(drawn, row_noise(4, [17], (9,), stream=2)[0])


def test_threads(monkeypatch):
    Runtime(threads=2).apply_threads()
    assert torch.get_num_threads() == 2
    Runtime().apply_threads()
    assert torch.get_num_threads() == 1  # under pytest
    monkeypatch.delenv("PYTEST_VERSION")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert 1 <= default_threads() <= 8
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert default_threads() == 3


def test_fabric_carries_the_settings():
    pytest.importorskip("lightning")
    fabric = Runtime(device="cpu", dtype="bfloat16").fabric()
    assert fabric.device.type == "cpu"
    assert fabric.world_size == 1


def test_fabric_without_lightning_names_the_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.fabric", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'diffcore\[train\]'"):
        Runtime().fabric()


def test_import_leaves_torch_out():
    code = "import sys, diffcore, diffcore.runtime, diffcore.errors; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0
