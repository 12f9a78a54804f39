import math
from dataclasses import replace

import pytest
import torch

from diffcore.errors import CorruptArtifactError, IncompatibleModelError
from nemo_localize.activations import mean_activations
from nemo_localize.candidates import candidates_of
from nemo_localize.files.statistics import load_statistics, save_statistics
from nemo_localize.first_step import FirstStep
from nemo_localize.planted import ordinary_captions
from nemo_localize.settings import SearchSettings
from nemo_localize.sites import value_sites
from nemo_localize.statistics import collect_statistics, merged


def activations_of(model, captions):
    sites = value_sites(model.backbone)
    return mean_activations(model.backbone, sites, model.prompts(captions)["encoder_hidden_states"])


def test_streaming_is_two_passes(simple):
    captions = ordinary_captions(50)
    found = collect_statistics(simple.model, iter(captions), source="made up", batch_size=7)
    rows = activations_of(simple.model, captions)
    assert torch.allclose(found.mean, rows.mean(0), atol=1e-6)
    assert torch.allclose(found.var, rows.var(0), atol=1e-6)
    assert found.sources == (("made up", 50),)


def test_activations_are_absolute_before_the_mean(simple):
    backbone = simple.model.backbone
    sites = value_sites(backbone)
    layer = backbone.get_submodule(sites.sites[2].module)
    state = torch.randn(1, 1, 32)
    states = torch.cat([state, -state], 1)  # token values +v and -v: the signed mean is 0
    found = mean_activations(backbone, sites, states)[:, list(sites.spans[2])]
    assert torch.allclose(found, layer(state)[0].abs().double(), atol=1e-6)


def test_no_network_but_the_value_layers_is_called(simple):
    with torch.no_grad():
        calls = []
        handle = simple.model.backbone.register_forward_pre_hook(lambda *args: calls.append(1))
        collect_statistics(simple.model, ordinary_captions(3))
        handle.remove()
    assert not calls


def test_shards_merge_to_the_whole_in_any_order(simple):
    captions = ordinary_captions(40)
    whole = collect_statistics(simple.model, captions)
    parts = [
        collect_statistics(simple.model, captions[k:e], source=str(k)) for k, e in ((25, 40), (0, 1), (1, 25), (0, 0))
    ]
    together = merged(parts)
    assert together.num_prompts == 40
    assert torch.allclose(together.mean, whole.mean, atol=1e-9)
    assert torch.allclose(together.var, whole.var, atol=1e-9)
    assert together.vocabulary == whole.vocabulary
    assert together.mean_length == pytest.approx(whole.mean_length)
    assert [count for _, count in together.sources] == [15, 1, 24, 0]


def test_what_never_varies_has_no_z_score(simple):
    found = collect_statistics(simple.model, ordinary_captions(20))
    constant = found.var.clone()
    constant[5] = 0
    dead = replace(found, var=constant)
    rows = activations_of(simple.model, ["something 77 else"])
    z = dead.z_scores(rows)
    assert z[0, 5] == 0
    assert torch.isfinite(z).all()
    assert dead.dead.sum() == 1
    single = collect_statistics(simple.model, ["one caption"])
    assert single.dead.all()
    assert not single.z_scores(rows).any()


def test_the_planted_neuron_stands_out(simple, usual):
    z = usual.z_scores(activations_of(simple.model, ["portrait of 1917 no 1"]))
    assert int(z[0].abs().argmax()) == 3
    assert z[0, 3] == pytest.approx(8, abs=1.5)


def test_statistics_survive_the_disk_and_know_their_model(simple, hard, usual, tmp_path):
    path = save_statistics(tmp_path / "statistics.safetensors", usual)
    back = load_statistics(path)
    assert torch.equal(back.mean, usual.mean)
    assert (back.vocabulary, back.sources, back.num_prompts) == (usual.vocabulary, usual.sources, usual.num_prompts)
    back.require(simple.model, value_sites(simple.model.backbone))
    with pytest.raises(IncompatibleModelError, match="not of planted"):
        back.require(hard.model, value_sites(hard.model.backbone))
    with pytest.raises(IncompatibleModelError, match="not of planted"):
        back.require(simple.model, value_sites(simple.model.backbone, up=True))
    path.with_suffix(".json").unlink()
    with pytest.raises(CorruptArtifactError):
        load_statistics(path)


def test_captions_unlike_the_reference_are_told(simple, usual):
    like = simple.model.prompts.tokenize(ordinary_captions(20, seed=9))
    assert usual.differences(like) == []
    strange = simple.model.prompts.tokenize(["12345 67890 " * 6])
    lengths, words = usual.differences(strange)
    assert "tokens on average" in lengths
    assert "never occur" in words


def test_candidates_are_nested_and_ordered(simple, usual, plain):
    sites = value_sites(simple.model.backbone)
    rounds = SearchSettings().rounds(max(sites.widths))
    assert len(rounds) == 16
    assert rounds[-1] == (1.25, 15)
    rows = activations_of(simple.model, ["portrait of 1917 no 1"])
    step = FirstStep(simple.model)
    (found,) = candidates_of(step, step.encode(["portrait of 1917 no 1"])[0], usual, SearchSettings())
    localizer = plain.PlainLocalizer(
        simple.model, [s.module for s in sites.sites], torch.zeros(1), usual.mean, usual.var.sqrt(), 0.5
    )
    for index, (theta, k) in enumerate(rounds):
        listed = localizer._candidates(rows[0], theta, k)
        assert found.sets[index] == {number for layer in listed for number in layer}
        assert found.layers(index, twice=True) == listed
        for ours, theirs in zip(found.layers(index), listed, strict=True):
            last = {number: place for place, number in enumerate(theirs)}  # a duplicate counts where it is last
            assert ours == sorted(last, key=lambda number: last[number])
        if index:
            assert found.sets[index - 1] <= found.sets[index]


def test_rounds_of_other_searches():
    assert SearchSettings(theta=2.0, theta_step=0.1, theta_min=1.0).rounds(9)[-1] == (pytest.approx(1.0), 10)
    assert [k for _, k in SearchSettings(criterion="outliers").rounds(9)] == [0] * 16
    alone = SearchSettings(criterion="top-k", k_step=4).rounds(9)
    assert [k for _, k in alone] == [0, 4, 8, 12]
    assert all(math.isinf(theta) for theta, _ in alone)
