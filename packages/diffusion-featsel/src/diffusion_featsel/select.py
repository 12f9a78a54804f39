"""Choosing a small set of activations under a budget.

Without labels, the default goes down the ranking by score, and leaves out what is nearly a copy (linear CKA of at least
0.9) of something chosen; or it adds what brings most information about the image's content, see `information`. With
labels it adds what raises cross-validated mIoU or PCK most, until nothing raises it by a standard error, and then tries
to do without each. Where candidates have several resolutions, a set has a coarse and a fine one.

References:
    Meng et al. 2024, section 4.3 and appendix G, choose about four by hand, each the best of its resolution.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, cast

import torch
from torch import Tensor

from diffusion_featsel.activation import Activation
from diffusion_featsel.alignment import Alignment
from diffusion_featsel.budget import Budget
from diffusion_featsel.information import ContentAndNoise
from diffusion_featsel.labelled import LabelledPairs, LabelledPixels
from diffusion_featsel.ranking import Ranking
from diffusion_featsel.search import Search, SelectSettings, Value
from diffusion_featsel.selection import Selection

Method = Literal["score", "information", "pixels", "pairs"]


def select(
    activations: Ranking | Mapping[str, Activation],
    budget: str | Budget,
    *,
    scores: Mapping[str, float] | None = None,
    alignment: Alignment | None = None,
    content: ContentAndNoise | None = None,
    pixels: LabelledPixels | None = None,
    pairs: LabelledPairs | None = None,
    presets: Mapping[str, Sequence[str]] | None = None,
    settings: SelectSettings | None = None,
) -> Selection:
    """Chooses a set of activations from exactly one kind of evidence.

    Args:
        activations: A ranking without labels, which brings its scores and similarities; or the name of each candidate
            to the activation, whose size and place in the network make its cost.
        budget: Largest cost of the set: "8MiB" and "3520ch" for one image's features, "flops:.6" for the share of the
            network that is run.
        scores: Score of each candidate, larger is better; those that are missing or NaN are no candidates.
        alignment: Similarity of candidates, with which nearly equal ones are left out; goes with `scores`.
        content: Covariances of content and noise of the candidates.
        pixels: Moments and kept pixels of labelled images.
        pairs: Stored matches of images with known key points.
        presets: Name of each set to compare with, such as "legacy", to its activations.
        settings: Size, redundancy, ladder, and random sets.

    Returns:
        The names in the order in which they were chosen. `details` holds the method, each step, the costs, and what the
        set was compared with.

    Raises:
        UserError: The budget is not understood, or below the cheapest candidate.
        ValueError: No evidence or several kinds are given.

    Example:
        >>> from diffcore.hooks import Site
        >>> def activation(name: str, grid: int) -> Activation:
        ...     return Activation(name, Site(name), "res-out", "up", channels=64, grid=(grid, grid))
        >>> candidates = {name: activation(name, grid) for name, grid in (("a", 8), ("b", 8), ("c", 16))}
        >>> select(candidates, "128ch", scores={"a": 0.9, "b": 0.8, "c": 0.5}).names
        ('a', 'c')
    """
    settings, budget = settings or SelectSettings(), Budget.of(budget)
    if isinstance(activations, Ranking):
        ranking = activations
        if scores is None and content is None and pixels is None and pairs is None:
            scores = ranking.scores(ranking.default)
        alignment = alignment or ranking.alignment
        chosen = select(
            {row.name: row.activation for row in ranking.rows},
            budget,
            scores=scores,
            alignment=alignment,
            content=content,
            pixels=pixels,
            pairs=pairs,
            presets=presets,
            settings=settings,
        )
        return replace(chosen, t=ranking.t, rms={name: ranking[name].rms for name in chosen.names})
    method, known, value = _evidence(scores, content, pixels, pairs)
    candidates = {name: activation for name, activation in activations.items() if name in known}
    budget.require_one(candidates)
    search = Search(candidates, budget, value, settings)
    if scores is not None:
        steps, dropped = search.by_score(scores, alignment)
    else:
        steps, dropped = search.greedy(), {}
    names = tuple(step.name for step in steps)
    return Selection(
        names,
        details={
            "method": method,
            "budget": budget.shown(budget.limit),
            "cost": budget.shown(budget.cost(names, activations)),
            "costs": search.costs(names),
            "value": search.mean(names),
            "steps": [step.to_json() for step in steps],
            "ladder": search.ladder_state(names),
            "left_out": dropped,
            "baselines": search.baselines(presets or {}),
        },
    )


def _evidence(
    scores: Mapping[str, float] | None,
    content: ContentAndNoise | None,
    pixels: LabelledPixels | None,
    pairs: LabelledPairs | None,
) -> tuple[Method, set[str], Value]:
    """Returns the method, the activations that can be valued, and the value of a set."""
    if sum(evidence is not None for evidence in (scores, content, pixels, pairs)) != 1:
        raise ValueError("give exactly one of `scores`, `content`, `pixels`, `pairs`")
    if scores is not None:
        # A plain mean: sets of the same size are compared by it, a set is not better for being large.
        known = {name for name, score in scores.items() if not math.isnan(score)}
        return "score", known, lambda names: _single(statistics.fmean(scores[name] for name in names))
    if content is not None:
        return "information", set(content.channels), lambda names: _single(content.information(names))
    if pixels is not None:
        return "pixels", set(pixels.gram.channels), _pixel_value(pixels)
    pairs = cast(LabelledPairs, pairs)
    return "pairs", set(pairs.names), pairs.pair_values


def _single(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def _pixel_value(pixels: LabelledPixels) -> Value:
    """Returns the mIoU of each fold, with the strongest regularisation that a member of the set needs alone."""
    strengths: dict[str, float] = {}

    def value(names: tuple[str, ...]) -> Tensor:
        for name in names:
            if name not in strengths:
                strengths[name] = pixels.strength([name])
        return pixels.fold_values(names, max(strengths[name] for name in names))

    return value
