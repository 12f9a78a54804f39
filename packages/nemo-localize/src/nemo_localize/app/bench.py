"""Benchmark cases: prompts localized in full batches against one question at a time, as the paper writes the method.

The models are U-Nets with planted memories, whose answer is known; both sides must give the same neurons.
"""

from collections.abc import Sequence
from functools import partial

from diffcore.bench import Case
from nemo_localize.first_step import FirstStep
from nemo_localize.localize import localize, localize_caption
from nemo_localize.planted import Planted, hard_case, list_case, ordinary_captions
from nemo_localize.results import CaptionResult, Results
from nemo_localize.settings import SearchSettings
from nemo_localize.statistics import collect_statistics

_TAU = 0.45


def cases(*, smoke: bool = False) -> list[Case]:
    """Returns the benchmark of this package.

    Args:
        smoke: Take fewer captions, for a check of agreement only.
    """
    planted, captions = hard_case()
    lists, many = list_case(3, 1) if smoke else list_case(64, 4)
    return [
        _case("localize one hard caption, against one question at a time", planted, captions, goal=1.5),
        _case("localize a list of captions, against one question at a time", lists, many, goal=1.5),
    ]


def _case(name: str, planted: Planted, captions: Sequence[str], goal: float) -> Case:
    statistics = collect_statistics(planted.model, ordinary_captions(500, seed=3))
    step = FirstStep(planted.model)
    settings = SearchSettings(unit_size=len(captions))

    def agree(ours: Results, theirs: list[CaptionResult]) -> bool:
        return all(
            (a.status, a.initial, a.refined) == (b.status, b.initial, b.refined)
            for a, b in zip(ours, theirs, strict=True)
        )

    return Case(
        name,
        {"captions": len(captions), "seeds": step.settings.num_seeds, "latent": "x".join(map(str, step.shape))},
        ours=partial(localize, step, captions, tau=_TAU, statistics=statistics, search=settings),
        reference=lambda: [localize_caption(step, text, tau=_TAU, statistics=statistics) for text in captions],
        agree=agree,
        goal=goal,
    )
