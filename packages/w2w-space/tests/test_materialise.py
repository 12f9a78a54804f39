"""LoHa, LoKr and whole differences as LoRAs, against matrices that are formed by hand and against peft itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, get_peft_model
from safetensors.torch import save_file

from diffcore.adapters import Base, read_adapter
from diffcore.adapters.keys import BACKBONE
from diffcore.cli import main
from diffcore.errors import IncompatibleModelError
from diffcore.models import from_pipeline
from diffcore.testing import tiny
from w2w_space.app.cli import app
from w2w_space.files.importing import import_adapters, plan_import
from w2w_space.files.materialise import materialise

SHAPES = {"down.0.to_q": (12, 8), "down.0.conv": (12, 8, 3, 3)}
BASE = Base("tiny", "unet", {BACKBONE: SHAPES})
G = torch.Generator().manual_seed(0)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=G)


def loha(shape: tuple[int, ...], rank: int = 3, alpha: float = 1.5) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    inputs = int(torch.tensor(shape[1:]).prod())
    parts = {"hada_w1_a": drawn(shape[0], rank), "hada_w1_b": drawn(rank, inputs)}
    parts |= {"hada_w2_a": drawn(shape[0], rank), "hada_w2_b": drawn(rank, inputs), "alpha": torch.tensor(alpha)}
    product = (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    return parts, (alpha / rank * product).reshape(shape)


def lokr(shape: tuple[int, ...], *, whole: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    w1 = drawn(3, 2)
    inner = (shape[0] // 3, shape[1] // 2, *shape[2:])
    if whole:
        w2 = drawn(*inner)
        parts = {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(7.0)}
    else:
        a, b = drawn(inner[0], 2), drawn(2, w2_inputs(inner))
        parts = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(1.0)}
        w2 = 0.5 * (a @ b).reshape(inner)
    return parts, torch.kron(w1.reshape(3, 2, *(1 for _ in shape[2:])), w2)


def w2_inputs(inner: tuple[int, ...]) -> int:
    return int(torch.tensor(inner[1:]).prod())


@pytest.mark.parametrize("module", SHAPES)
@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "LoKr, whole", "difference"])
def test_the_change_is_that_of_the_formula(tmp_path: Path, kind: str, module: str):
    shape = SHAPES[module]
    if kind == "LoHa":
        parts, wanted = loha(shape)
    elif kind == "difference":
        wanted = drawn(*shape)
        parts = {"diff": wanted}
    else:
        parts, wanted = lokr(shape, whole="whole" in kind)
    path = tmp_path / "a.safetensors"
    name = f"lora_unet_{module.replace('.', '_')}"
    save_file({f"{name}.{part}": tensor for part, tensor in parts.items()}, path)
    with pytest.raises(IncompatibleModelError, match="not supported"):
        read_adapter(path, BASE)
    whole, losses = materialise(path, BASE, 12)
    assert torch.allclose(whole.modules[module].delta(), wanted, atol=1e-4)
    assert losses[module].relative < 1e-5
    cut, losses = materialise(path, BASE, 2)
    values = torch.linalg.svdvals(wanted.flatten(1))
    assert losses[module].relative == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-3)
    error = float((cut.modules[module].delta() - wanted).norm() / wanted.norm())
    assert error == pytest.approx(losses[module].relative, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dora_scale": torch.ones(12, 1)}, "DoRA"),
        ({"hada_t1": torch.ones(3, 3, 1, 1)}, "LoHa"),
        ({"hada_w1_a": None}, "lacks 'hada_w1_a'"),
        ({"hada_w1_a": torch.ones(12, 2)}, "do not fit together"),
        ({"hada_w1_a": torch.ones(5, 3), "hada_w2_a": torch.ones(5, 3)}, "where the model has 12x8"),
        ({"hada_w1_a": torch.full((12, 3), float("nan"))}, "not finite"),
        ({"lokr_w1": torch.ones(3, 2)}, "two methods"),
        ({"lora_down.weight": torch.ones(1, 8)}, "belongs to no LoHa"),
    ],
)
def test_what_cannot_be_turned_is_named(tmp_path: Path, change: dict[str, Any], message: str):
    parts = {**loha(SHAPES["down.0.to_q"])[0], **change}
    stored = {f"lora_unet_down_0_to_q.{part}": value for part, value in parts.items() if value is not None}
    save_file(stored, tmp_path / "a.safetensors")
    with pytest.raises(IncompatibleModelError, match=message):
        materialise(tmp_path / "a.safetensors", BASE, 2)
    save_file({f"lora_unet_up_9.{k}": v for k, v in loha((12, 8))[0].items()}, tmp_path / "b.safetensors")
    with pytest.raises(IncompatibleModelError, match="does not have, nearest"):
        materialise(tmp_path / "b.safetensors", BASE, 2)


def output(unet: Any) -> torch.Tensor:
    x, t, cond = tiny.inputs("sd15")
    with torch.no_grad():
        return unet(x, t, **cond).sample


def by_peft(folder: Path, config: Any) -> torch.Tensor:
    """Writes an adapter of peft, and returns the output that it gives."""
    model = get_peft_model(tiny.pipeline("sd15").unet, config)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "hada_" in name or "lokr_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.3)
    model.save_pretrained(str(folder))
    return output(model)


CONFIGS = {
    "LoHa": LoHaConfig(r=2, alpha=6, target_modules=["to_q", "to_v"]),
    "LoKr": LoKrConfig(r=2, alpha=6, target_modules=["to_q", "to_v"]),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters_of_peft_keep_their_outputs(tmp_path: Path, kind: str):
    theirs = by_peft(tmp_path / "a", CONFIGS[kind])
    model = from_pipeline(tiny.pipeline("sd15"))
    adapter, losses = materialise(tmp_path / "a", model.adapter_base, 64)
    assert max(loss.relative for loss in losses.values()) < 1e-5
    ours = output(model.with_adapter(adapter).backbone)
    assert float((theirs - output(model.backbone)).abs().max()) > 1e-2
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_ranks_of_single_modules_are_refused(tmp_path: Path):
    """Their strengths would be read wrongly: the configuration has a pattern for each."""
    save_file({"base_model.model.down.0.to_q.lokr_w1": drawn(12, 8)}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LOKR", "r": 2, "alpha": 4, "rank_pattern": {}, "alpha_pattern": {}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(IncompatibleModelError, match="lacks 'lokr_w2_a'"):
        materialise(tmp_path, BASE, 2)
    for pattern in ("rank_pattern", "alpha_pattern"):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {pattern: {"to_q": 8}}))
        with pytest.raises(IncompatibleModelError, match="of single modules"):
            materialise(tmp_path, BASE, 2)


def test_populations_and_conversions_take_them_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    tiny.pipeline("sd15").save_pretrained("model")
    paths = [Path(kind) for kind in CONFIGS]
    for path, config in zip(paths, CONFIGS.values(), strict=True):
        by_peft(path, config)
    base = from_pipeline(tiny.pipeline("sd15")).adapter_base
    with pytest.raises(Exception, match="none of 2 files"):
        plan_import(paths, base)
    with pytest.raises(Exception, match="no file says a rank"):
        plan_import(paths, base, materialise=True)
    found = import_adapters("pop", paths, base, rank=4, materialise=True, largest_loss=1.0)
    assert found.names == ("LoHa", "LoKr")
    for member, path in zip(found.members, paths, strict=True):
        adapter, losses = materialise(path, base, 4)
        whole = sum(loss.lost for loss in losses.values()) / sum(loss.total for loss in losses.values())
        assert member.loss == pytest.approx(whole**0.5)
        assert any("no LoRA" in note for note in member.notes)
        read = found.layout.adapter(found.rows([found.names.index(member.name)])[0])
        assert all(c.relative_error(read.modules[n]) < 1e-5 for n, c in adapter.modules.items())
    assert import_adapters("pop", paths, base, rank=4, materialise=True, largest_loss=1.0).names == found.names
    words = ["convert", "LoHa", "lora.safetensors", "--materialise", "--model", "model", "--json"]
    assert main(app, words) == 2
    assert "--rank" in capsys.readouterr().err
    assert main(app, [*words, "--rank", "3"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert 0 < told["loss"] <= told["worst_loss"] < 1
    assert {change.rank for change in read_adapter("lora.safetensors", base).modules.values()} == {3}
