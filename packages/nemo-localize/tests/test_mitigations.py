"""The other mitigations of copying, and images that resume."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from diffcore.hooks import Site, attention_probs, capture
from diffcore.noise import row_noise
from diffcore.run import Run, RunMap
from nemo_localize.activations import prompt_encoder
from nemo_localize.generate import generate
from nemo_localize.mitigations import (
    adjusted_condition,
    mitigated_latents,
    random_neurons,
    scaled_attention,
    with_random_tokens,
)
from nemo_localize.neurons import NO_NEURONS, NeuronSet
from nemo_localize.planted import Planted
from nemo_localize.settings import ImageSettings, Mitigation
from nemo_localize.sites import value_sites

TRIGGER = "portrait of 1917 no 1"
FAST = ImageSettings(guidance_scale=1.0, steps=2)


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


def test_every_mitigation_generates_from_the_same_noise(simple: Planted):
    mitigations: tuple[Mitigation, ...] = get_args(Mitigation)
    items = [(TRIGGER, simple.carriers(TRIGGER))]
    found = {name: mitigated_latents(simple.model, items, range(50, 52), FAST, name) for name in mitigations}
    before = found.pop("none")
    changes = {name: float((latents - before).norm() / before.norm()) for name, latents in found.items()}
    assert all(change > 1e-4 for change in changes.values())
    assert changes["random-neurons"] < 0.2 * changes["neurons"]
    again = mitigated_latents(simple.model, [(TRIGGER, NO_NEURONS)], range(50, 52), FAST, "none")
    assert torch.equal(again, before)


def test_prompts_of_other_neurons_share_no_edit(simple: Planted):
    own, others = simple.carriers(TRIGGER), NeuronSet.of({value_sites(simple.model.backbone).sites[1].module: [2, 5]})
    items = [(TRIGGER, own), ("xy", others), (TRIGGER, NO_NEURONS)]
    together = mitigated_latents(simple.model, items, range(2), FAST, "neurons")
    alone = torch.cat([mitigated_latents(simple.model, [item], range(2), FAST, "neurons") for item in items])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[2], atol=1e-2)
    shared = mitigated_latents(simple.model, [(TRIGGER, own), ("xy", own)], range(2), FAST, "neurons")
    torch.testing.assert_close(shared[:1], alone[:1], rtol=1e-4, atol=1e-5)


def test_prompts_draw_at_random_independently_and_again_the_same(simple: Planted, monkeypatch: pytest.MonkeyPatch):
    numbers: list[int] = []

    def spied(model: Any, prompt: str, count: int, *, seed: int) -> str:
        numbers.append(seed)
        return prompt

    monkeypatch.setattr("nemo_localize.mitigations.with_random_tokens", spied)
    for prompt, repeat in ((TRIGGER, 0), ("xy", 0), (TRIGGER, 1), (TRIGGER, 0)):
        mitigated_latents(
            simple.model, [(prompt, NO_NEURONS)], range(1), ImageSettings(1.0, 1), "random-tokens-1", repeat=repeat
        )
    assert len(set(numbers[:3])) == 3
    assert numbers[3] == numbers[0]


def test_images_of_other_neurons_seeds_or_steps_are_generated_anew(simple: Planted, tmp_path: Path):
    carriers = simple.carriers(TRIGGER)
    with Run.open(tmp_path / "run", command="nemo-localize generate", config={}) as run:

        def drawn(neurons: NeuronSet, seeds: range = range(2), steps: int = 2, scale: float = 0.0) -> torch.Tensor:
            settings = ImageSettings(1.0, steps)
            return generate(
                simple.model,
                [TRIGGER],
                seeds,
                mitigations=("neurons",),
                neurons=neurons,
                scale=scale,
                settings=settings,
                map=RunMap(run),
            )["neurons"]

        first = drawn(carriers)
        assert not torch.equal(drawn(NeuronSet.of({})), first)
        assert not torch.equal(drawn(carriers, range(5, 7)), first)
        assert not torch.equal(drawn(carriers, steps=3), first)
        assert not torch.equal(drawn(carriers, scale=0.5), first)
        assert torch.equal(drawn(carriers), first)


def test_generated_prompts_are_not_generated_again(simple: Planted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def open_run() -> Run:
        return Run.open(tmp_path / "run", command="nemo-localize generate", config={})

    settings = replace(FAST, batch_size=2)  # one prompt a unit

    def generated(run: Run, *prompts: str) -> torch.Tensor:
        return generate(simple.model, prompts, range(2), mitigations=("none",), settings=settings, map=RunMap(run))[
            "none"
        ]

    with open_run() as run:
        first = generated(run, TRIGGER, "xy")
        # The package exports a function of the module's name.
        monkeypatch.setattr(sys.modules["nemo_localize.generate"], "mitigated_latents", None)
    with open_run() as run:
        second = generated(run, "xy", TRIGGER, "xy")
    assert torch.equal(second, first[[1, 0, 1]])
