"""Benchmark cases: localisation against the plain sequential algorithm, with the same latents, threshold, statistics.

The models are U-Nets with planted memories, whose answer is known; both sides must give the same neurons.
"""

from collections.abc import Sequence
from functools import partial

from diffcore.bench import Case
from nemo_localize.first_step import FirstStep
from nemo_localize.localize import localize
from nemo_localize.plain import Answer, PlainLocaliser
from nemo_localize.planted import Planted, hard_case, list_case, ordinary_captions
from nemo_localize.results import CaptionResult, Results
from nemo_localize.settings import SearchSettings, StepSettings
from nemo_localize.statistics import collect_statistics

_TAU = 0.45


def cases(*, smoke: bool = False) -> list[Case]:
    """Returns the benchmark of this package.

    Args:
        smoke: Fewer captions, for a check of agreement only.
    """
    planted, captions = hard_case()
    lists, many = list_case(3, 1) if smoke else list_case(64, 4)
    return [
        _case("localise one hard caption, against the published order of calls", planted, captions, goal=1.5),
        _case("localise a list of captions, against the published order of calls", lists, many, goal=1.5),
    ]


def _case(name: str, planted: Planted, captions: Sequence[str], goal: float) -> Case:
    statistics = collect_statistics(planted.model, ordinary_captions(500, seed=3))
    step = FirstStep(planted.model, StepSettings())
    modules = [site.module for site in step.sites.sites]
    plain = PlainLocaliser(planted.model, modules, step.noise, statistics.mean, statistics.var.sqrt(), _TAU)
    settings = SearchSettings(unit_size=len(captions))

    def agree(ours: Results, theirs: list[Answer]) -> bool:
        return all(_same(step, ours[place], answer) for place, answer in enumerate(theirs))

    return Case(
        name,
        {"captions": len(captions), "seeds": step.settings.num_seeds, "latent": "x".join(map(str, step.shape))},
        ours=partial(localize, step, captions, tau=_TAU, statistics=statistics, settings=settings),
        reference=lambda: [plain.localise(caption) for caption in captions],
        agree=agree,
        goal=goal,
    )


def _same(step: FirstStep, ours: CaptionResult, answer: Answer) -> bool:
    if ours.status != answer.status or step.sites.numbers(ours.initial) != answer.initial:
        return False
    return step.sites.numbers(ours.refined or ours.initial) == (answer.refined or answer.initial)
