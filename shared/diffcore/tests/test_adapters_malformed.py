"""Every malformed adapter is refused with an error for a person; nothing of it runs, nothing is written or applied."""

import re
import warnings

import pytest
import torch

from diffcore.adapters import read_adapter
from diffcore.errors import UserError
from diffcore.models.bases import base_of
from diffcore.testing import tiny
from diffcore.testing.malformed.adapters import adapter_cases, valid_peft, valid_tensors
from diffcore.testing.sentinel import listing, sentinel

CASES = {case.name: case for case in adapter_cases()}


@pytest.fixture(scope="module")
def base():
    modules = {"text_encoder": tiny.text_encoder()}
    return base_of("tiny-sd", modules, tiny.backbone("sd15"))


def test_there_are_enough_and_the_valid_ones_are_read(base, tmp_path):
    from safetensors.torch import save_file

    assert len(CASES) == len(adapter_cases())  # names are unique
    assert len(CASES) >= 150
    save_file(valid_tensors(), tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="alpha of 1 of 2 modules"):
        read = read_adapter(tmp_path / "a.safetensors", base)
    assert sorted(change.alpha for change in read.modules.values()) == [1.0, 2.0]
    read = read_adapter(valid_peft(tmp_path), base)
    assert [change.alpha for change in read.modules.values()] == [4.0]


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused(base, tmp_path, name):
    source = CASES[name].make(tmp_path)
    before = listing(tmp_path)
    with sentinel(tmp_path) as events, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserError) as caught:
            read_adapter(source, base)
    message = str(caught.value)
    assert events == []
    assert listing(tmp_path) == before
    assert message.isprintable()  # one line
    assert len(message) < 900
    assert ";" in message  # what was wrong; what to do
    assert any(part in message for part in (source.name[:20], "adapter_config.json", "\\x1b[31m"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("tensors: down alone", "to_q.lora_down.weight' without its partner (up)"),
        ("tensors: down another rank", "of different rank: "),
        ("tensors: NaN in up", "to_q.lora_up.weight' with numbers that are not finite"),
        ("tensors: alpha of 0", "alphas are above 0 and at most 65536"),
        ("tensors: alpha of -2", "a negative strength is asked for by the scale"),
        ("config: a negative alpha", "has lora_alpha = -4; alphas are above 0"),
        ("tensors: one factor spelled twice", "gives one factor twice"),
        ("tensors: one layer in two layouts", "mixes two layouts"),
        (
            "tensors: one layer under two names",
            "changes 'mid_block.attentions.0.transformer_blocks.0.attn1.to_q' twice",
        ),
        ("tensors: two adapters", "mixes two adapters"),
        ("tensors: down narrower", "for a weight of 64x63, but"),
        ("tensors: a second text encoder", "2 of 7 adapter tensors that do not fit tiny-sd; first: 'lora_te2_"),
        ("tensors: nothing but a second text encoder", "it changes text_encoder_2, which the model lacks"),
        ("tensors: another family", "holds nothing that fits tiny-sd: it changes 'single_transformer_blocks.0"),
        (
            "tensor of a middle factor",
            "lora_mid.weight', of a LoCon with a middle factor (Tucker), which is",
        ),
        ("tensor of DoRA of kohya", ", of DoRA, which is not supported"),
        ("tensor of a layer that is not there", "without its partner (up)"),
        ("disguise in .bin: GGUF", "is a pickle, which can run code when read"),
        ("config: a library that is not there", "sets megatron_config to"),
        ("config: a pattern with a character that is not allowed", "only plain names of modules are read"),
        ("config: a rank of 2^40", "ranks are whole numbers from 1 to 4096"),
        ("config: another rank than the file's", "of rank 2, but its configuration says 3"),
        ("config: PiSSA", "sets init_lora_weights to pissa, which is not supported"),
        ("header: another alpha than the tensor's", "says alpha = 1 in tensor"),
        ("folder: a socket for adapter_model.safetensors", "is not a regular file"),
    ],
)
def test_it_is_refused_for_the_right_reason(base, tmp_path, name, reason):
    source = CASES[name].make(tmp_path)
    with pytest.raises(UserError, match=re.escape(reason)):
        read_adapter(source, base)


def test_patterns_for_modules_are_never_evaluated(base, tmp_path):
    """PEFT matches a text under `target_modules` as a regular expression, which may never end; here it is not read."""
    read = read_adapter(valid_peft(tmp_path, target_modules="nothing is called so!"), base)
    assert len(read.modules) == 1


def test_a_refused_adapter_leaves_the_model_as_it_was(tmp_path):
    from diffcore.models import load
    from diffcore.runtime import Runtime

    tiny.backbone("sd15").save_pretrained(tmp_path / "unet")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load(tmp_path / "unet", Runtime(device="cpu"))
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    folder = tmp_path / "lora"
    folder.mkdir()
    source = CASES["tensors: NaN in up"].make(folder)
    with pytest.raises(UserError):
        model.with_adapter(source)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.backbone.state_dict().items())
