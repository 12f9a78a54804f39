"""Every malformed model is refused with an error for a person; nothing of it runs, nothing is written."""

import os
import pickle
import re
import warnings
from fractions import Fraction

import diffusers
import pytest
import transformers

from diffcore.checkpoint import inspect_model
from diffcore.errors import UserError
from diffcore.models import load
from diffcore.runtime import Runtime
from diffcore.testing.malformed import cases, make_bases
from diffcore.testing.sentinel import listing, sentinel

CPU = Runtime(device="cpu")
CASES = {case.name: case for case in cases()}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = make_bases(tmp_path_factory.mktemp("bases"))
    load(made.pipeline, CPU)  # libraries import lazily; do it before anyone watches
    load(made.single, CPU, like=made.like)
    return made


@pytest.fixture(autouse=True)
def no_loader_of_the_libraries(monkeypatch):
    """The gate holds by itself: calling any `from_pretrained` is a failure of its own."""

    def trap(*args, **kwargs):
        raise AssertionError("from_pretrained was called")

    for kind in (diffusers.ModelMixin, diffusers.DiffusionPipeline, diffusers.ConfigMixin, diffusers.SchedulerMixin):
        if hasattr(kind, "from_pretrained"):
            monkeypatch.setattr(kind, "from_pretrained", trap)
    for kind in (transformers.PreTrainedModel, transformers.PreTrainedConfig, transformers.PreTrainedTokenizerBase):
        monkeypatch.setattr(kind, "from_pretrained", trap)


def test_there_are_enough_of_every_kind():
    counts = {kind: sum(case.kind == kind for case in CASES.values()) for kind in ("safetensors", "config", "disguise")}
    assert len(CASES) == len(cases())  # names are unique
    assert counts["safetensors"] >= 70
    assert counts["config"] >= 50
    assert counts["disguise"] >= 30
    assert len(CASES) - sum(counts.values()) >= 20


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused(bases, tmp_path, name):
    case = CASES[name]
    source = case.make(bases, tmp_path)
    before, here = listing(tmp_path), listing(bases.backbone.parent)
    options = {"like": bases.like} if str(source).endswith((".safetensors", ".ckpt")) else {}
    with sentinel(tmp_path) as events, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserError) as caught:
            load(source, CPU, **options, **dict(case.options))
    message = str(caught.value)
    assert events == []
    assert listing(tmp_path) == before
    assert listing(bases.backbone.parent) == here
    assert message.count("\n") == 0
    assert message.isprintable()
    assert len(message) < 900
    assert ";" in message  # what was wrong; what to do
    named = source.name if hasattr(source, "name") else "missing"
    assert any(
        part in message for part in (named, "a\\x00b", "\\x1b[31m", os.devnull, *(c.name for c in tmp_path.rglob("*")))
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("header: metadata: half a character", "has metadata that is not Unicode"),
        ("header text: minus zero", "has the number -0 in its header"),
        ("config: an address", "sets activation_fn to 'https://example.org/missing', which is no setting"),
        ("config: a repository", "sets activation_fn to 'stranger/missing', which is no setting"),
        ("config: another attention", "sets _attn_implementation to another; only eager and sdpa"),
        ("config: 256 layers and two in the file", "asks for 256 layers or more, but there are"),
        ("index names a missing file of another kind", "'missing.bin', which is no safetensors file of its folder"),
        ("index names a missing file by its whole path", "'/missing.safetensors', which is no safetensors file of"),
        ("index: a library that is not there", "asks for missing.Missing for unet, a class of its own"),
        ("folder: a socket beside the weights", "holds s, which is a socket"),
    ],
)
def test_the_gate_alone_refuses_for_the_right_reason(bases, tmp_path, name, reason):
    """Behind the gate stand more walls, which would hide that it has a hole."""
    with pytest.raises(UserError, match=re.escape(reason)):
        inspect_model(CASES[name].make(bases, tmp_path))


def test_the_sentinel_would_have_seen_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with sentinel(tmp_path) as events:
        pickle.loads(pickle.dumps(Fraction(1, 2)))
        os.system("true")
        (tmp_path / "x").write_text("x")
        exec(compile("1", str(tmp_path / "own.py"), "exec"))
    assert any(event.startswith("os.system") for event in events)
    assert any(event.startswith("pickle.find_class") for event in events)
    assert any(event.startswith("open for writing") for event in events)
    assert any(event.startswith("exec") for event in events)


def test_a_clean_load_is_silent(bases, tmp_path):
    with sentinel(bases.backbone.parent) as events, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load(bases.backbone, CPU)
        load(bases.pipeline, CPU)
        load(bases.single, CPU, like=bases.like)
    assert events == []


def test_scripts_and_pickles_beside_good_weights_are_never_opened(bases, tmp_path):
    from diffcore.testing.malformed.case import copied

    model = copied(bases.pipeline, tmp_path)
    for name in ("None.py", "unet/own.py", "unet/diffusion_pytorch_model.bin"):
        (model / name).write_text("raise SystemExit")
        os.chmod(model / name, 0)
    with sentinel(tmp_path) as events, pytest.warns(UserWarning, match="3 files are never opened: None.py"):
        load(model, CPU)
    assert events == []
