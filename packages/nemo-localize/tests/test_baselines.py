"""The other ways against copying, and pictures that resume."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from diffcore.hooks import Site, attention_probs, capture
from diffcore.noise import row_noise
from diffcore.run import Run
from nemo_localize.activations import prompt_encoder
from nemo_localize.generate import generate
from nemo_localize.images import Drawing
from nemo_localize.mitigations import (
    adjusted_condition,
    draw_mitigated,
    random_neurons,
    scaled_attention,
    with_random_tokens,
)
from nemo_localize.neurons import NeuronSet
from nemo_localize.planted import Planted
from nemo_localize.sites import value_sites

TRIGGER = "portrait of 1917 no 1"
FAST = Drawing(guidance_scale=1.0, steps=2)


def test_random_neurons_are_as_many_others_of_each_layer(simple: Planted):
    sites = value_sites(simple.model.backbone)
    first, last = sites.sites[0].module, sites.sites[-1].module
    found = NeuronSet.of({first: range(12), last: [3]})
    drawn = [random_neurons(simple.model, found, seed=seed) for seed in range(20)]
    for chosen in drawn:
        assert len(chosen[first]) == min(12, sites.widths[0] - 12)
        assert len(chosen[last]) == 1
        assert not set(chosen) & set(found)
    assert len(set(drawn)) > 1
    assert random_neurons(simple.model, found, seed=3) == drawn[3]


def test_adjustment_nears_the_output_without_a_caption(simple: Planted):
    model, encoder = simple.model, prompt_encoder(simple.model)
    noise = row_noise(0, range(4), (4, 16, 16))
    t = torch.full((4,), float(model.denoiser.schedule.timesteps(50)[0]))

    def distance(cond: Any) -> float:
        with torch.no_grad():
            with_, without = (
                model.denoiser(noise, t, {key: value.expand(4, *value.shape[1:]) for key, value in c.items()}).output
                for c in (cond, encoder.unconditional(1))
            )
        return float((with_ - without).norm())

    before = encoder([TRIGGER])
    after = adjusted_condition(model, before, range(4))
    assert distance(after) < 0.5 * distance(before)
    same = adjusted_condition(model, encoder([""]), range(4))
    assert torch.equal(same["encoder_hidden_states"], encoder([""])["encoder_hidden_states"])


@pytest.mark.parametrize("guided", [False, True])
def test_attention_is_scaled_where_it_should_be(simple: Planted, guided: bool):
    backbone: Any = simple.model.backbone
    attention = value_sites(backbone).sites[0].module.removesuffix(".to_v")
    module: Any = backbone.get_submodule(attention)
    encoder = prompt_encoder(simple.model)
    states = torch.cat([encoder([""])["encoder_hidden_states"], encoder([TRIGGER])["encoder_hidden_states"]])
    x_t, t = row_noise(0, range(2), (4, 16, 16)), torch.full((2,), 981.0)
    with torch.no_grad(), capture(backbone, [Site(f"{attention}.to_q"), Site(f"{attention}.to_k")]) as plain:
        simple.model.denoiser(x_t, t, {"encoder_hidden_states": states})
    scaled = scaled_attention(simple.model, TRIGGER, guided=guided)
    with torch.no_grad(), scaled, attention_probs(backbone, [attention]) as probs:
        simple.model.denoiser(x_t, t, {"encoder_hidden_states": states})
    query, key = (
        plain[f"{attention}.{name}"].unflatten(2, (module.heads, -1)).transpose(1, 2) for name in ("to_q", "to_k")
    )
    logits = query @ key.transpose(2, 3) * module.scale
    logits[slice(1, None) if guided else slice(None), :, :, 0] *= 1.25
    length = int(encoder.tokenize([TRIGGER]).masks[0].sum())
    logits[..., length:] = -1e4
    torch.testing.assert_close(probs[attention], logits.softmax(-1), rtol=1e-4, atol=1e-6)
    assert not probs[attention][..., length:].any()


def test_random_tokens_are_put_between_the_words(simple: Planted):
    words = TRIGGER.split(" ")
    for count in (1, 4, 10):
        found = with_random_tokens(simple.model, TRIGGER, count, seed=5).split(" ")
        assert len(found) == len(words) + count
        rest = iter(found)
        assert all(word in rest for word in words)
    texts = {with_random_tokens(simple.model, TRIGGER, 4, seed=seed) for seed in range(5)}
    assert len(texts) == 5


def test_every_way_draws_from_the_same_noise(simple: Planted):
    carriers = simple.carriers(TRIGGER)
    drawn = {
        way: draw_mitigated(simple.model, TRIGGER, range(50, 52), FAST, way, neurons=carriers)
        for way in ("none", "neurons", "random-neurons", "embedding-adjustment", "attention-scaling", "random-tokens-4")
    }
    before = drawn.pop("none")
    changes = {way: float((latents - before).norm() / before.norm()) for way, latents in drawn.items()}
    assert all(change > 1e-4 for change in changes.values())
    assert changes["random-neurons"] < 0.2 * changes["neurons"]
    again = draw_mitigated(simple.model, TRIGGER, range(50, 52), FAST, "none")
    assert torch.equal(again, before)


def test_captions_draw_at_random_independently_and_again_the_same(simple: Planted, monkeypatch: pytest.MonkeyPatch):
    numbers: list[int] = []

    def spied(model: Any, prompt: str, count: int, *, seed: int) -> str:
        numbers.append(seed)
        return prompt

    monkeypatch.setattr("nemo_localize.mitigations.with_random_tokens", spied)
    for prompt, repeat in ((TRIGGER, 0), ("xy", 0), (TRIGGER, 1), (TRIGGER, 0)):
        draw_mitigated(simple.model, prompt, range(1), Drawing(1.0, 1), "random-tokens-1", repeat=repeat)
    assert len(set(numbers[:3])) == 3
    assert numbers[3] == numbers[0]


def test_pictures_of_other_neurons_seeds_or_steps_are_drawn_anew(simple: Planted, tmp_path: Path):
    carriers = simple.carriers(TRIGGER)
    with Run.open(tmp_path / "run", command="nemo-localize generate", config={}) as run:

        def drawn(neurons: NeuronSet, seeds: range = range(2), steps: int = 2) -> torch.Tensor:
            return generate(simple.model, [TRIGGER], ("neurons",), seeds, Drawing(1.0, steps), run, neurons=neurons)[
                "neurons"
            ]

        first = drawn(carriers)
        assert not torch.equal(drawn(NeuronSet.of({})), first)
        assert not torch.equal(drawn(carriers, range(5, 7)), first)
        assert not torch.equal(drawn(carriers, steps=3), first)
        assert torch.equal(drawn(carriers), first)


def test_drawn_captions_are_not_drawn_again(simple: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def open_run() -> Run:
        return Run.open(tmp_path / "run", command="nemo-localize generate", config={})

    with open_run() as run:
        first = generate(simple.model, [TRIGGER, "xy"], ("none",), range(2), FAST, run)
        # The package exports a function of the module's name.
        monkeypatch.setattr(sys.modules["nemo_localize.generate"], "draw_mitigated", None)
    with open_run() as run:
        second = generate(simple.model, ["xy", TRIGGER, "xy"], ("none",), range(2), FAST, run)
    assert torch.equal(second["none"], first["none"][[1, 0, 1]])
