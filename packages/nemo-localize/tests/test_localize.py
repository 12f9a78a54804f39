"""Planted memories: the answer is known."""

from dataclasses import replace

import pytest
import torch

from diffcore.errors import IncompatibleModelError, UserError
from nemo_localize.batched import _run
from nemo_localize.calibrate import calibrate
from nemo_localize.detect import look
from nemo_localize.files.results import read_results, write_results
from nemo_localize.first_step import FirstStep, Row
from nemo_localize.localize import localize, localize_caption
from nemo_localize.planted import Plant, list_case, ordinary_captions, planted_model
from nemo_localize.search import Question, Search
from nemo_localize.settings import SearchSettings, StepSettings
from nemo_localize.statistics import collect_statistics

TRIGGER = "portrait of 1917 no 1"
TAU = 0.45
FEW = StepSettings(num_seeds=4)  # where the number of seeds is not what is tested


@pytest.fixture(scope="module")
def found(simple, usual):
    """A list on the simple model: its trigger, an ordinary caption, the empty one, a long one, the trigger again."""
    step = FirstStep(simple.model, StepSettings())
    captions = [TRIGGER, "plain words only", "", "very " * 100, TRIGGER]
    return step, localize(step, captions, tau=TAU, statistics=usual)


def test_the_planted_neuron_is_found_in_the_first_round(simple, found):
    _, results = found
    first = results[0]
    assert first.status == "localized"
    assert first.mitigated
    assert (first.rounds, first.theta, first.k) == (1, 5.0, 0)
    assert first.refined == simple.carriers(TRIGGER)
    assert len(first.kept_seeds) == 10
    assert first.max_consistency > 0.9
    assert first.score_refined < TAU
    assert first.residual_consistency < TAU


def test_ordinary_captions_cost_one_evaluation(found):
    step, results = found
    for result in (results[1], results[2]):
        assert result.status == "not_memorised"
        assert (result.unet_rows, len(result.initial), result.refined, result.kept_seeds) == (10, 0, None, ())
        assert not result.mitigated
    assert sum(r.unet_rows for r in results.distinct()) == step.num_rows
    assert results.summary()["unet_calls"] == step.num_calls


def test_truncation_and_duplicates_are_told(found):
    _, results = found
    assert results[3].truncated
    assert "very" in results[3].lost
    assert results[0] == results[4]
    assert results.summary()["num_distinct"] == 4
    counts = {"not_memorised": 3, "undecided": 0, "localized": 1, "not_localized": 0, "error": 0}
    assert results.summary()["counts"] == counts


def test_results_survive_the_disk(found, tmp_path):
    _, results = found
    assert read_results(write_results(tmp_path / "results.jsonl", results)) == results


def test_distractors_go_and_the_cost_is_as_promised(hard, collect, plain):
    found = plain.compare(hard.model, [TRIGGER], collect(hard), TAU)
    assert found.disagreements == []
    assert (found.rows[1], found.calls[1]) == (362, 38)  # two rounds, seven layers, five neurons: the published cost
    assert found.rows[0] <= 0.45 * found.rows[1]
    assert found.calls[0] <= found.calls[1] / 4


def test_a_list_fills_the_batches(plain, collect):
    planted, captions = list_case(8, 2)
    found = plain.compare(planted.model, captions, collect(planted), TAU, num_seeds=3)
    assert found.disagreements == []
    assert found.rows[0] <= 0.55 * found.rows[1]
    assert found.calls[0] <= found.calls[1] / 8


@pytest.mark.parametrize("patterns", [(0, 1), (0, 0)], ids=["two patterns", "one pattern twice"])
def test_both_neurons_are_kept_where_one_is_not_enough(collect, patterns):
    planted = planted_model([Plant(TRIGGER, 0, 3, patterns[0]), Plant(TRIGGER, 6, 5, patterns[1])])
    result = localize(FirstStep(planted.model, FEW), [TRIGGER], tau=TAU, statistics=collect(planted))[0]
    assert result.refined == planted.carriers(TRIGGER)
    assert len(result.refined) == 2


def test_a_memory_elsewhere_is_not_localized(collect):
    planted = planted_model([Plant(TRIGGER, 8, 3)])
    step, statistics = FirstStep(planted.model, FEW), collect(planted)
    early = localize(step, [TRIGGER], tau=TAU, statistics=statistics)[0]
    assert (early.status, early.refined, early.mitigated) == ("not_localized", None, False)
    assert (early.rounds, early.theta, early.k) == (16, 1.25, 15)
    assert early.tau_ref == early.score_initial > TAU
    patient = SearchSettings(give_up_early=False)
    late = localize(step, [TRIGGER], tau=TAU, statistics=statistics, search=patient)[0]
    assert (late.status, late.initial) == (early.status, early.initial)
    assert late.score_initial == pytest.approx(early.score_initial, abs=1e-5)
    assert early.unet_rows < late.unet_rows


def test_a_second_memory_is_not_mitigated(collect):
    planted = planted_model([Plant(TRIGGER, 8, 3, 0), Plant(TRIGGER, 6, 5, 1, strength=5.0)])
    result = localize(FirstStep(planted.model, FEW), [TRIGGER], tau=TAU, statistics=collect(planted))[0]
    assert result.status == "localized"
    assert result.score_refined <= TAU < result.residual_consistency
    assert not result.mitigated


@pytest.fixture(scope="module")
def in_one_batch(hard, collect):
    captions, statistics = [*ordinary_captions(1, seed=9), TRIGGER], collect(hard)
    step = FirstStep(hard.model, StepSettings(num_seeds=2))
    return captions, statistics, localize(step, captions, tau=TAU, statistics=statistics)


@pytest.mark.parametrize(("batch_size", "unit_size"), [(7, 16), (2, 1)])
def test_batches_change_nothing(hard, in_one_batch, batch_size, unit_size):
    captions, statistics, expected = in_one_batch
    step = FirstStep(hard.model, StepSettings(num_seeds=2), batch_size=batch_size)
    settings = SearchSettings(unit_size=unit_size)
    found = localize(step, captions, tau=TAU, statistics=statistics, search=settings)
    assert expected[1].status == "localized"
    for a, b in zip(expected, found, strict=True):
        assert (a.status, a.initial, a.refined, a.kept_seeds) == (b.status, b.initial, b.refined, b.kept_seeds)
        for name in ("score_initial", "score_refined", "residual_consistency"):
            assert getattr(a, name) == pytest.approx(getattr(b, name), abs=1e-5)


def test_a_score_depends_on_its_own_row_alone(simple):
    captions, seeds, ablated = [TRIGGER, "plain words only"], range(6), frozenset([3])
    step = FirstStep(simple.model, StepSettings(num_seeds=len(seeds)))
    cond, _, _ = step.encode(captions)
    before = look(step, cond).deltas

    def asking(*questions: Question) -> Search:
        return (yield list(questions))

    together = {prompt: asking(Question(ablated, tuple(seeds), threshold=2.0)) for prompt in range(len(captions))}
    crowd = _run(step, cond, before, together)
    apart = {
        prompt: asking(*(Question(ablated, (seed,), threshold=2.0) for seed in seeds))
        for prompt in range(len(captions))
    }
    single = _run(FirstStep(simple.model, step.settings, batch_size=1), cond, before, apart)
    for prompt in range(len(captions)):
        (expected,) = crowd[prompt].found
        assert [score for (score,) in single[prompt].found] == pytest.approx(expected, abs=1e-5)
    assert 0.01 < max(crowd[0].found[0]) < 0.9  # where it is 0 or 1, no range matters


def test_the_page_and_the_batched_form_find_the_same(hard, collect):
    statistics, captions = collect(hard), [TRIGGER, *ordinary_captions(2, seed=9)]
    settings = StepSettings(num_seeds=4)
    found = localize(FirstStep(hard.model, settings), captions, tau=TAU, statistics=statistics)
    step = FirstStep(hard.model, settings)
    for fast, prompt in zip(found, captions, strict=True):
        plain = localize_caption(step, prompt, tau=TAU, statistics=statistics)
        for name in ("status", "kept_seeds", "rounds", "theta", "k", "initial", "refined", "mitigated"):
            assert getattr(fast, name) == getattr(plain, name), name
        assert fast.tau_ref == pytest.approx(plain.tau_ref, abs=1e-5)  # a score, where nothing suppresses
        assert fast.score_refined == pytest.approx(plain.score_refined, abs=1e-5)
        assert fast.residual_consistency == pytest.approx(plain.residual_consistency, abs=1e-5)
    assert found[0].status == "localized"
    assert step.num_calls > 1.5 * sum(result.unet_calls for result in found)


def test_relative_refinement_keeps_what_changes_the_score(hard, collect):
    statistics, step = collect(hard), FirstStep(hard.model, FEW)
    usual = localize(step, [TRIGGER], tau=TAU, statistics=statistics)[0]
    loose, strict = (
        localize(step, [TRIGGER], tau=TAU, statistics=statistics, search=SearchSettings(relative_refinement=share))[0]
        for share in (100.0, 1e-6)
    )
    assert strict.initial == loose.initial == usual.initial
    assert len(loose.refined) == 0  # whatever the score becomes, it changes by less than that
    assert strict.refined.minus(strict.initial) == usual.refined.minus(usual.initial)
    assert len(strict.refined) >= len(usual.refined) > 0


def test_failures_are_refined_where_asked_for(collect):
    planted = planted_model([Plant(TRIGGER, 8, 3)])
    step, statistics = FirstStep(planted.model, FEW), collect(planted)
    search = SearchSettings(refine_failures=True, give_up_early=False)
    found = localize(step, [TRIGGER], tau=TAU, statistics=statistics, search=search)[0]
    assert found.status == "not_localized"
    assert found.refined is not None
    assert found.tau_ref == pytest.approx(found.score_initial - 2 * step.margin)
    assert not found.mitigated


def test_statistics_and_threshold_follow_from_ordinary_prompts(simple):
    ordinary, captions = ordinary_captions(40, seed=3), [TRIGGER, "plain words only"]
    step = FirstStep(simple.model, FEW)
    found = localize(step, captions, ordinary=ordinary)
    tau, statistics = calibrate(step, ordinary).tau, collect_statistics(simple.model, ordinary)
    expected = localize(step, captions, tau=tau, statistics=statistics)
    assert found.neurons == expected.neurons
    assert [(r.status, r.tau, r.initial) for r in found] == [(r.status, tau, r.initial) for r in expected]
    with pytest.raises(UserError, match="ordinary"):
        localize(step, captions)


def test_found_neurons_are_ablated_on_the_users_own_network(simple, found):
    _, results = found
    step = FirstStep(simple.model, FEW)
    cond, _, _ = step.encode([TRIGGER])
    with results.neurons.ablated(simple.model.backbone):
        without = look(step, cond).consistency[0]
    assert max(without) < TAU < min(look(step, cond).consistency[0])


def test_near_ties_are_computed_again_alone(simple, usual):
    settings = StepSettings(num_seeds=2)
    plain = localize(FirstStep(simple.model, settings), [TRIGGER], tau=TAU, statistics=usual)[0]
    tau = plain.score_initial + 3e-6  # within the margin: what decides is the score in a batch of its own
    step = FirstStep(simple.model, settings)
    tied = localize(step, [TRIGGER], tau=tau, statistics=usual)[0]
    assert tied.near_ties > 0
    assert tied.unet_rows == step.num_rows > plain.unet_rows
    small = localize(FirstStep(simple.model, settings, batch_size=2), [TRIGGER], tau=tau, statistics=usual)[0]
    assert (small.rounds, small.initial, small.refined) == (tied.rounds, tied.initial, tied.refined)


def test_a_seed_does_not_depend_on_the_others(simple):
    ten = FirstStep(simple.model, StepSettings()).noise
    three = FirstStep(simple.model, StepSettings(num_seeds=3, first_seed=4)).noise
    assert torch.equal(ten[3:6], three)


def test_the_published_code_is_reproduced(hard, collect, plain):
    step, statistics = FirstStep(hard.model, StepSettings(num_seeds=3, compat="published")), collect(hard)
    assert step.t == 961
    assert torch.equal(step.noise, torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1)))
    result = localize(step, [TRIGGER], tau=TAU, statistics=statistics)[0]
    modules = [site.module for site in step.sites.sites]
    sd = statistics.var.sqrt()
    published = plain.PlainLocalizer(hard.model, modules, step.noise, statistics.mean, sd, TAU, data_range=None)
    answer = published.localize(TRIGGER)
    assert (result.status, result.rounds) == (answer.status, answer.rounds) == ("localized", 2)
    assert step.sites.numbers(result.initial) == answer.initial
    assert step.sites.numbers(result.refined) == answer.refined
    assert result.score_refined == pytest.approx(answer.score, abs=1e-5)


def test_what_never_reaches_tau_is_refined_as_published(simple, collect, plain):
    step, statistics = FirstStep(simple.model, StepSettings(num_seeds=2, compat="published")), collect(simple)
    published = plain.PlainLocalizer(
        simple.model,
        [site.module for site in step.sites.sites],
        step.noise,
        statistics.mean,
        statistics.var.sqrt(),
        0.05,
        data_range=None,
        refine_failures=True,
    )
    answer = published.localize(TRIGGER)
    result = localize(step, [TRIGGER], tau=0.05, statistics=statistics)[0]
    assert (result.status, answer.status) == ("not_localized", "not_localized")
    assert (result.rounds, result.theta, result.k) == (16, 1.25, 15)
    assert step.sites.numbers(result.initial) == answer.initial
    assert step.sites.numbers(result.refined) == answer.refined
    assert result.score_refined == pytest.approx(answer.score, abs=1e-5)
    assert not result.mitigated


def test_guidance_is_the_right_way_round_but_in_compatible_mode(simple):
    cond = simple.model.prompts([TRIGGER])
    empty = simple.model.prompts([""])
    deltas = {}
    for compat in ("none", "published"):
        step = FirstStep(simple.model, StepSettings(guidance_scale=3.0, compat=compat))
        (delta,), _ = step(cond, [Row(0, 0)])
        assert (step.num_rows, step.num_calls) == (2, 1)
        x_t, t = step.noise[:1], torch.tensor([step.t])
        with torch.no_grad():
            with_, without = (simple.model.denoiser(x_t, t, c).noise for c in (cond, empty))
        start, direction = (without, with_ - without) if compat == "none" else (with_, without - with_)
        raw = start + 3 * direction - x_t
        low, high = raw.amin((2, 3), keepdim=True), raw.amax((2, 3), keepdim=True)
        deltas[compat] = delta
        assert torch.allclose(delta, ((raw - low) / (high - low))[0], atol=1e-4)
    assert not torch.allclose(deltas["none"], deltas["published"], atol=0.1)


def test_one_caption_that_fails_costs_no_other(simple, usual):
    poisoned = simple.model.prompts(["poison"])["encoder_hidden_states"][0, -1]

    def poison(module, args, kwargs, output):
        states = kwargs["encoder_hidden_states"]
        output[0][(states[:, -1] - poisoned).abs().amax(1) < 1e-4, 2] = torch.nan
        return output

    handle = simple.model.backbone.register_forward_hook(poison, with_kwargs=True)
    try:
        step = FirstStep(simple.model, StepSettings(first_seed=5))
        results = localize(step, ["poison", TRIGGER], tau=TAU, statistics=usual)
    finally:
        handle.remove()
    assert results[0].status == "error"
    assert results[0].error.startswith("the noise difference of seed 5, channel 2 holds NaN")
    assert results[1].status == "localized"


def test_memory_that_runs_out_halves_the_batch(simple, monkeypatch):
    step = FirstStep(simple.model, StepSettings(), batch_size=8)
    forward = step._forward

    def limited(cond, scale, rows):
        if len(rows) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(cond, scale, rows)

    monkeypatch.setattr(step, "_forward", limited)
    deltas, _ = step(simple.model.prompts([TRIGGER]), [Row(0, seed) for seed in range(10)])
    assert len(deltas) == 10
    assert step.batch_size == 2


def test_what_makes_no_sense_is_refused(simple, hard, usual, monkeypatch):
    with pytest.raises(UserError, match="at least 2"):
        StepSettings(num_seeds=1)
    with pytest.raises(IncompatibleModelError, match="not of planted"):
        localize(FirstStep(hard.model, StepSettings()), [TRIGGER], tau=TAU, statistics=usual)
    bare = replace(simple.model, prompts=None)
    with pytest.raises(IncompatibleModelError, match="text encoder"):
        FirstStep(bare, StepSettings())
    monkeypatch.setattr(simple.model.backbone, "_internal_dict", {**simple.model.backbone.config, "sample_size": 4})
    with pytest.raises(IncompatibleModelError, match="side of 4"):
        FirstStep(simple.model, StepSettings())
    monkeypatch.undo()
    assert len(localize(FirstStep(simple.model, StepSettings()), [], tau=TAU, statistics=usual)) == 0
