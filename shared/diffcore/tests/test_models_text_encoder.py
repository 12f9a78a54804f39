"""A T5 from a folder of its own stands in for the one that a pipeline came without."""

import json
import shutil

import pytest
import torch

from diffcore import Runtime
from diffcore.errors import IncompatibleModelError, ModelNotFoundError
from diffcore.models import load
from diffcore.testing import tiny

CPU = Runtime(device="cpu")
T5 = {"pixart": "", "sd3": "_3", "flux": "_2"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Whole pipelines, the same without their T5, and that T5 with its vocabulary in one folder."""
    root = tmp_path_factory.mktemp("t5")
    for name, slot in T5.items():
        tiny.pipeline(name).save_pretrained(root / name)
        shutil.copytree(root / name, root / f"{name} bare")
        own = root / f"{name} own"
        shutil.copytree(root / name / f"text_encoder{slot}", own)
        shutil.copytree(root / name / f"tokenizer{slot}", own, dirs_exist_ok=True)
        for part in ("text_encoder", "tokenizer"):
            shutil.rmtree(root / f"{name} bare" / f"{part}{slot}")
    return root


@pytest.mark.parametrize("name", T5)
def test_conditions_are_those_of_the_whole_pipeline(folders, name):
    whole = load(folders / name, CPU)
    prompts = ["a cat", "the quick brown fox"]
    expected = whole.prompts(prompts)
    if name == "sd3":
        without = load(folders / "sd3 bare", CPU).prompts(prompts)
        assert not torch.equal(without["encoder_hidden_states"], expected["encoder_hidden_states"])
    else:
        with pytest.warns(UserWarning, match="name a T5 with `text_encoder`"):
            assert load(folders / f"{name} bare", CPU).prompts is None
    slot = T5[name]
    for place in (folders / f"{name} own", folders / name, folders / name / f"text_encoder{slot}"):
        found = load(folders / f"{name} bare", CPU, text_encoder=place)
        assert found.fingerprint == whole.fingerprint
        cond = found.prompts(prompts)
        assert cond.keys() == expected.keys()
        assert all(torch.equal(cond[key], expected[key]) for key in expected)


def test_another_t5_is_another_model(folders, tmp_path):
    shutil.copytree(folders / "pixart own", tmp_path / "t5")
    tiny.t5_encoder(seed=5).save_pretrained(tmp_path / "t5")
    whole = load(folders / "pixart", CPU)
    other = load(folders / "pixart", CPU, text_encoder=tmp_path / "t5")  # in place of its own
    assert other.fingerprint != whole.fingerprint
    states = [model.prompts(["a cat"])["encoder_hidden_states"] for model in (whole, other)]
    assert not torch.allclose(*states)


def test_what_does_not_fit_is_refused(folders, tmp_path):
    def refused(message: str, place, model: str = "pixart bare", kind: type[Exception] = IncompatibleModelError):
        with pytest.raises(kind, match=message):
            load(folders / model, CPU, text_encoder=place)

    refused("is no folder; give the folder of a T5", tmp_path / "none", kind=ModelNotFoundError)
    refused("has states of width 64, PixArtTransformer2DModel takes 32", folders / "sd3 own")
    refused("has model_type clip_text_model where t5 is expected", folders / "flux" / "text_encoder")
    refused("holds no T5", folders / "flux bare")
    tiny.backbone("pixart").save_pretrained(folders / "alone")
    with pytest.raises(IncompatibleModelError, match="PixArtTransformer2DModel takes no T5"):
        load(folders / "alone", CPU, text_encoder=folders / "pixart own")
    wordless = shutil.copytree(folders / "pixart own", tmp_path / "wordless")
    (wordless / "tokenizer.json").unlink()
    refused("has no vocabulary", wordless)
    coded = shutil.copytree(folders / "pixart own", tmp_path / "coded")
    config = json.loads((coded / "config.json").read_text())
    (coded / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.T5"}}))
    refused("never runs code", coded)
