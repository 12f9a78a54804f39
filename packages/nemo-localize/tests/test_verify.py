from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from diffcore.errors import UserError
from diffcore.models.assemble import make_denoiser
from nemo_localize import protocol
from nemo_localize.ablate import ablated
from nemo_localize.adversary import STATES, search_embeddings, starting_embeddings
from nemo_localize.first_step import FirstStep
from nemo_localize.images import generate_latents
from nemo_localize.likeness import likeness
from nemo_localize.neurons import NO_NEURONS
from nemo_localize.planted import Planted, ordinary_captions
from nemo_localize.score import stretched
from nemo_localize.settings import ImageSettings, StepSettings
from nemo_localize.variants import paraphrases, without_tokens
from nemo_localize.verification import CaptionVerification, Check, Verification
from nemo_localize.verify import verify

TRIGGER, OTHER = "portrait of 1917 no 1", "some other thing 42"
TAU = 0.5


@pytest.fixture(scope="module", autouse=True)
def short() -> Iterator[None]:
    """A protocol in miniature: in fewer steps and draws the searches come less near."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocol, "AUDIT_STEPS", 30)
        patch.setattr(protocol, "AUDIT_DRAWS", 4)
        patch.setattr(protocol, "COPY_ABOVE", 0.5)
        patch.setattr(protocol, "DROPPED_TOKENS", 1)
        patch.setattr(protocol, "PARAPHRASES", ("a photo of {}",))
        for name in ("HELD_OUT_SEEDS", "VARIANT_SEEDS", "AUDIT_SEEDS", "TARGET_SEEDS"):
            patch.setattr(protocol, name, getattr(protocol, name)[:2])
        yield


@pytest.fixture(scope="module")
def step(leaky: Planted) -> FirstStep:
    return FirstStep(leaky.model, StepSettings(num_seeds=3))


@pytest.fixture(scope="module")
def controls() -> list[str]:
    return ordinary_captions(3, seed=9)


SETTINGS = ImageSettings(guidance_scale=3.0, steps=10)


def kinds(caption: CaptionVerification) -> dict[tuple[bool, str], Check]:
    return {(check.edited, check.kind): check for check in caption.checks}


def test_a_leak_with_a_second_way_in_is_closed_for_the_caption_and_opened_by_the_audit(
    leaky: Planted, step: FirstStep, controls
):
    found = verify(step, leaky.carriers(TRIGGER), [TRIGGER], controls, tau=TAU, settings=SETTINGS)
    checks = kinds(found.captions[0])
    assert checks[True, "held-out seeds"].copies == 0
    assert checks[True, "search from noise"].copies > 0
    assert found.captions[0].reopened
    assert (found.verdict, found.exit_code) == ("open", 1)
    assert not any(control.open for control in found.controls)
    assert found.rows()[0]["verdict"] == "open"
    assert found.to_json()["protocol"]["audit_steps"] == 30


def test_a_leak_without_any_way_in_is_closed(leaky: Planted, step: FirstStep, controls):
    both = leaky.carriers(TRIGGER).union(leaky.carriers(OTHER))
    masked = verify(step, both, [TRIGGER], controls, tau=TAU, settings=SETTINGS)
    assert (masked.verdict, masked.exit_code, masked.reasons) == ("closed", 0, ())
    assert masked.captions[0].similarity < 0.3
    assert masked.summary()["controls_opened"] == 0


def test_a_search_that_starts_at_the_caption_finds_another_way_in(leaky: Planted, step: FirstStep, monkeypatch):
    monkeypatch.setattr(protocol, "AUDIT_STEPS", 50)
    monkeypatch.setattr(protocol, "AUDIT_DRAWS", 8)
    cond, seeds, same = step.encode([TRIGGER])[0], range(5, 7), likeness(of_latents=True)
    target = generate_latents(leaky.model, cond, seeds, SETTINGS)[0, :1]
    with ablated(leaky.model.backbone, leaky.carriers(TRIGGER)):
        found = search_embeddings(leaky.model, cond, cond[STATES], [target])
        images = [
            generate_latents(leaky.model, {STATES: states}, seeds, SETTINGS)[0] for states in (cond[STATES], found)
        ]
    before, after = (same.towards(stretched(target)[0], stretched(own)[0]) for own in images)
    assert float(before.max()) < 0.3
    assert float(after.min()) > 0.7


@pytest.mark.parametrize("guidance_scale", [1.0, 7.0])
def test_images_are_clamped_where_the_scheduler_says_so(leaky: Planted, step: FirstStep, guidance_scale: float):
    cond, settings = step.encode([TRIGGER])[0], ImageSettings(guidance_scale=guidance_scale, steps=4)
    schedule = replace(leaky.model.denoiser.schedule, clip_x0=0.25, set_alpha_to_one=True)
    denoiser = make_denoiser(leaky.model.backbone, leaky.model.denoiser.prediction_type, schedule)
    clamped = replace(leaky.model, denoiser=denoiser)
    assert float(generate_latents(leaky.model, cond, range(2), settings).abs().max()) > 0.5
    assert float(generate_latents(clamped, cond, range(2), settings).abs().max()) == 0.25


def test_searches_do_not_feel_one_another(leaky: Planted, step: FirstStep, monkeypatch):
    monkeypatch.setattr(protocol, "AUDIT_STEPS", 3)
    cond = step.encode([TRIGGER, OTHER])[0]
    targets = [latents[:1] for latents in generate_latents(leaky.model, cond, range(5, 7), SETTINGS)]
    starts = starting_embeddings(cond[STATES])[:, 1]
    together = search_embeddings(leaky.model, cond, starts, targets, batch_size=64)
    apart = search_embeddings(leaky.model, cond, starts, targets, batch_size=1)
    torch.testing.assert_close(together, apart, atol=2e-3, rtol=0)
    assert 0.2 < float((together - starts).abs().max()) < 0.301  # in three steps of Adam, at most 0.1 each
    assert torch.equal(starting_embeddings(cond[STATES])[0, 1], starting_embeddings(cond[STATES][1:])[0, 1])


def test_dropped_tokens_move_the_rest_up(step: FirstStep):
    whole = step.encoder.tokenize([TRIGGER])
    length = int(whole.masks[0].sum())
    protocol_count = protocol.DROPPED_TOKENS
    tokens, labels = without_tokens(step.encoder, TRIGGER)
    assert len(tokens) == len(labels) == protocol_count
    (row,), (mask,) = tokens.ids[0].tolist(), tokens.masks[0].tolist()
    full = whole.ids[0][0].tolist()
    assert any(full[:place] + full[place + 1 : length] == row[: length - 1] for place in range(1, length - 1))
    assert row[0] == full[0]
    assert (len(row), sum(mask)) == (len(full), length - 1)


def test_paraphrases_are_other_wordings():
    assert paraphrases("a red cat", ["a cat, red", "a red cat"]) == ["a cat, red", "a photo of a red cat", "red cat a"]
    assert "x" not in paraphrases("x")


def caption(prompt: str, *checks: tuple[bool, str, int], residual: float = 0.1) -> CaptionVerification:
    made = tuple(Check(edited, kind, 0.9 if copies else 0.1, copies, 8, "") for edited, kind, copies in checks)  # pyright: ignore[reportArgumentType]
    return CaptionVerification(prompt, "training image", residual, 0.5, made)


KNOWN = (False, "held-out seeds", 8), (False, "search from noise", 1)
SHUT = (True, "held-out seeds", 0), (True, "search from noise", 0)
HARMLESS = tuple(caption(f"control {i}", *SHUT) for i in range(3))


def verification(*captions: CaptionVerification, controls: tuple[CaptionVerification, ...] = HARMLESS) -> Verification:
    return Verification(captions, controls, "SSIM", "", {})


def test_the_verdict_follows_the_protocol():
    closed = caption("closed", *KNOWN, *SHUT)
    opened = caption("opened", *KNOWN, SHUT[0], (True, "search from noise", 1))
    assert verification(closed).verdict == "closed"
    ranked = verification(closed, opened).rows()
    assert [row["verdict"] for row in ranked] == ["open", "closed", "control", "control", "control"]
    assert verification(closed, opened).verdict == "open"
    # A hit means nothing where a caption that was never memorised is hit too.
    hit = caption("control", (True, "search from caption", 1))
    assert verification(closed, opened, controls=(*HARMLESS, hit)).verdict == "inconclusive"
    # A miss means nothing where the audit misses what is known to be there.
    blind = caption("blind", KNOWN[0], (False, "search from noise", 0), *SHUT)
    assert verification(blind).verdict == "inconclusive"
    assert "so a miss means nothing" in verification(blind).reasons[0]
    assert verification(blind, closed).verdict == "closed"
    # No leak to close, and seeds that still agree on something.
    assert "no leak to close" in verification(caption("never", (False, "held-out seeds", 0), *SHUT)).reasons[0]
    assert verification(closed, caption("second", *KNOWN, *SHUT, residual=0.6)).verdict == "inconclusive"
    assert verification(closed, blind, controls=()).exit_code == 0


def test_a_verification_needs_controls_that_are_none_of_the_captions(step: FirstStep, controls):
    for few in ([], controls[:2], [controls[0]] * 3):
        with pytest.raises(UserError, match="never memorised"):
            verify(step, NO_NEURONS, [TRIGGER], few, tau=TAU)
    with pytest.raises(UserError, match="leave it out of one list"):
        verify(step, NO_NEURONS, [TRIGGER], [*controls, TRIGGER], tau=TAU)
    with pytest.raises(UserError, match="no prompt to verify"):
        verify(step, NO_NEURONS, [], controls, tau=TAU)
