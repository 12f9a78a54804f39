"""Neurons to ablate are read from everything that the commands' help names."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from diffcore.errors import CorruptArtifactError, UserError
from diffcore.io.jsonfile import write_json
from nemo_localize.app import cli
from nemo_localize.files.neurons import most_frequent, read_neurons
from nemo_localize.files.results import write_results
from nemo_localize.first_step import FirstStep
from nemo_localize.minimal_set import minimal_set
from nemo_localize.neurons import NO_NEURONS, NeuronSet
from nemo_localize.planted import Planted, ordinary_captions
from nemo_localize.results import CaptionResult, Results
from nemo_localize.settings import StepSettings

FIRST = NeuronSet.of({"down_blocks.0.attn2.to_v": [3, 1]})
SECOND = NeuronSet.of({"down_blocks.0.attn2.to_v": [1], "mid_block.attn2.to_v": [0]})
BOTH = FIRST.union(SECOND)
RESULTS = Results(
    (
        CaptionResult("a", "1", "localized", initial=BOTH, refined=FIRST),
        CaptionResult("b", "2", "localized", initial=BOTH, refined=SECOND),
        CaptionResult("c", "3", "not_localized", initial=BOTH, refined=BOTH),
        CaptionResult("d", "4", "not_memorised"),
    )
)
BY_CAPTION = {"a": FIRST, "b": SECOND}
TOLD = {"neurons": BOTH.to_json(), "captions": {prompt: found.to_json() for prompt, found in BY_CAPTION.items()}}


def test_results_tell_neurons_and_captions(tmp_path: Path):
    path = write_results(tmp_path / "results.jsonl", RESULTS)
    assert read_neurons(path) == read_neurons(tmp_path) == (BOTH, BY_CAPTION)


@pytest.mark.parametrize("name", ["neurons.json", "manifest.json"])
def test_audits_and_edits_tell_both(tmp_path: Path, name: str):
    path = write_json(tmp_path / name, {"schema": "any@1", **TOLD, "more": 1})
    assert read_neurons(path) == read_neurons(tmp_path) == (BOTH, BY_CAPTION)


def test_what_an_audit_confirmed_is_taken_before_its_results(tmp_path: Path):
    write_results(tmp_path / "results.jsonl", RESULTS)
    write_json(tmp_path / "neurons.json", {"neurons": FIRST.to_json()})
    assert read_neurons(tmp_path) == (FIRST, {})


def test_a_plain_object_is_enough(tmp_path: Path):
    assert read_neurons(write_json(tmp_path / "mine.json", BOTH.to_json())) == (BOTH, {})


@pytest.mark.parametrize(
    "content",
    [{"neurons": [1, 2]}, {"a.to_v": 3}, {"a.to_v": [1.5]}, {"a.to_v": [-1]}, TOLD | {"captions": {"a": [1]}}],
    ids=["a list", "no list", "a fraction", "negative", "a caption's list"],
)
def test_other_objects_are_refused(tmp_path: Path, content: dict[str, Any]):
    with pytest.raises(CorruptArtifactError, match=r"mine.json holds no neurons"):
        read_neurons(write_json(tmp_path / "mine.json", content))


def test_what_failed_is_a_captions_own_where_it_was_refined_and_asked_for(tmp_path: Path):
    path = write_results(tmp_path / "results.jsonl", RESULTS)
    together, captions = read_neurons(path, failed=True)
    assert together == BOTH  # of localized captions, as ever
    assert captions == {**BY_CAPTION, "c": BOTH}


def test_the_most_frequent_neurons_come_first():
    third = NeuronSet.of({"mid_block.attn2.to_v": [0, 5]})
    captions = {"a": FIRST, "b": SECOND, "c": third}
    twice = NeuronSet.of({"down_blocks.0.attn2.to_v": [1], "mid_block.attn2.to_v": [0]})
    assert most_frequent(captions, 2) == twice
    assert most_frequent(captions, 1) == NeuronSet.of({"down_blocks.0.attn2.to_v": [1]})  # of ties the shallower
    assert most_frequent(captions, 4) == NO_NEURONS.union(*captions.values())
    for wrong in (0, -1, 5):
        with pytest.raises(UserError, match="4 different neurons"):
            most_frequent(captions, wrong)
    with pytest.raises(UserError, match="not told by caption"):
        most_frequent({}, 1)


def test_nothing_there_is_said(tmp_path: Path):
    with pytest.raises(UserError, match="holds no neurons; give a run"):
        read_neurons(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        read_neurons(tmp_path / "none.json")


def test_a_minimal_set_is_exported_from_its_file(
    leaky: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    step = FirstStep(leaky.model, StepSettings(num_seeds=2))
    prompts = list(dict.fromkeys(plant.trigger for plant in leaky.plants))
    found = [
        CaptionResult(prompt, prompt, "localized", kept_seeds=(1, 2), refined=leaky.carriers(prompt))
        for prompt in prompts
    ]
    edit = minimal_set(step, Results(tuple(found)), ordinary_captions(2, seed=9), tau=0.8, budget=1.0)
    monkeypatch.chdir(tmp_path)
    path = write_json(Path("minimal.json"), edit.to_json())
    assert len(edit.neurons) == 2
    assert read_neurons(path) == (edit.neurons, {})
    backbone: Any = leaky.model.backbone
    backbone.save_pretrained("unet")
    assert cli.app(["export", "unet", "--neurons", "minimal.json", "--no-lora", "--out", "edit", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_neurons"] == 2
    (written,) = Path("edit/model").glob("*.safetensors")
    before, after = load_file(Path("unet") / written.name), load_file(written)
    changed = [name for name, tensor in before.items() if not tensor.equal(after[name])]
    assert sorted(changed) == [f"{name}.weight" for name, _ in edit.neurons.layers]
    assert all(not after[f"{name}.weight"][list(channels)].any() for name, channels in edit.neurons.layers)
