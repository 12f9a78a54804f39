"""Images have the last word, and ordinary prompts a say in it."""

import sys

import pytest

from diffcore.digests import digest_of
from diffcore.noise import row_noise
from nemo_localize.confirm import confirm
from nemo_localize.likeness import likeness
from nemo_localize.neurons import NeuronSet
from nemo_localize.planted import Planted
from nemo_localize.results import CaptionResult, Results

COPIED, COPIED_MORE, CLOSED = "copied", "copied, with more candidates", "closed"
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
CHOSEN = NeuronSet.of({LAYER: [0]})
CANDIDATES = {COPIED: range(2), COPIED_MORE: range(5, 9), CLOSED: range(10, 12)}


@pytest.fixture
def confirmed(simple: Planted, monkeypatch: pytest.MonkeyPatch):
    results = Results(
        tuple(
            CaptionResult(prompt, digest_of(prompt), "localized", initial=NeuronSet.of({LAYER: channels}))
            for prompt, channels in CANDIDATES.items()
        )
    )
    before = row_noise(0, range(6), (3, 16, 16)).sigmoid().unflatten(0, (3, 2))
    after = before.clone()
    after[2] = row_noise(1, range(2), (3, 16, 16)).sigmoid()
    after[1, 0] = row_noise(2, range(1), (3, 16, 16)).sigmoid()[0]  # one seed that copies is enough
    images = {"none": before, "neurons": after}
    # The package exports a function of the module's name.
    monkeypatch.setattr(sys.modules["nemo_localize.confirm"], "generate", lambda *args, **kwargs: images)

    def ask(most: int | None) -> tuple[NeuronSet, list[str]]:
        return confirm(
            simple.model,
            results,
            CHOSEN,
            [*CANDIDATES],
            range(2),
            judge=likeness(),
            affordable=None if most is None else lambda neurons: len(neurons) <= most,
        )

    return ask


@pytest.mark.parametrize(
    ("most", "channels"), [(None, [0, 1, 5, 6, 7, 8]), (6, [0, 1, 5, 6, 7, 8]), (5, [0, 1]), (1, [0])]
)
def test_captions_that_copy_give_their_candidates_as_far_as_is_bearable(
    confirmed, most: int | None, channels: list[int]
):
    neurons, stubborn = confirmed(most)
    assert neurons == NeuronSet.of({LAYER: channels})
    assert stubborn == [COPIED, COPIED_MORE]
