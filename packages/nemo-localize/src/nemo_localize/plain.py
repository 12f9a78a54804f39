"""Localisation done plainly: one caption, one candidate set, one call at a time, at the cost of the published code.

What `bench` compares with. What is plain here and costs: the network runs at two timesteps though one is used, all ten
seeds run in every question, activations come from a whole pass in every round, and each test of refinement is a
question of its own. The ten seeds do share a batch. Written from the paper's algorithms; it shares no code with ours
but the published similarity, which has oracles of its own.

References:
    Hintersdorf, Struppek et al. 2024, algorithms 1 to 4.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim

from nemo_localize.score import reference_similarity

Layers = list[list[int]]
"""Per value layer its neurons; a neuron may be listed twice, as in the published code."""

THETAS = [5 - 0.25 * index for index in range(16)]


def select_plainly(sets: Sequence[frozenset[int]], tau: float, score: Callable[[frozenset[int]], float]) -> int | None:
    """Returns the index of the first set that scores at most tau; None where there is none."""
    for index, off in enumerate(sets):
        if score(off) <= tau:
            return index
    return None


def refine_plainly(layers: Layers, threshold: float, score: Callable[[frozenset[int]], float]) -> Layers:
    """Returns what is left after switching layers, last to first, then single neurons on again, greedily.

    Neurons are numbered through the layers. Of a neuron that is listed twice, the first copy goes first.
    """
    kept = [list(layer) for layer in layers]
    for place in reversed(range(len(kept))):
        if kept[place]:
            others = kept[:place] + kept[place + 1 :]
            if score(_together(others)) < threshold:
                kept[place] = []
    for place in reversed(range(len(kept))):
        for neuron in list(kept[place]):
            before = list(kept[place])
            kept[place].remove(neuron)
            if not score(_together(kept)) < threshold:
                kept[place] = before
    return kept


@dataclass
class Answer:
    """What was found for one caption, and what it cost.

    Attributes:
        status: not_memorised, localised or not_localised.
        initial: Numbers of the selected candidates.
        refined: Of what is left.
        rounds: Candidate sets tried.
        score: Of the refined set.
        num_rows: Latents through the network.
        num_calls: Forward passes.
    """

    status: str
    initial: frozenset[int] = frozenset()
    refined: frozenset[int] = frozenset()
    rounds: int = 0
    score: float = float("nan")
    num_rows: int = 0
    num_calls: int = 0


@dataclass
class PlainLocaliser:
    """The published algorithm on one model.

    Attributes:
        model: With `denoiser`, `backbone` and `prompts`.
        modules: Names of the searched value projections, shallowest first.
        noise: One latent per seed.
        mean: Usual activation of every neuron, numbered through the layers.
        sd: Its standard deviation.
        tau: The threshold.
        used: Which of the two timesteps counts; the published code takes the second.
        data_range: Of the similarity; None takes it from the batch, as published.
        refine_failures: Refine captions that never fall to tau too, as published.
    """

    model: Any
    modules: Sequence[str]
    noise: Tensor
    mean: Tensor
    sd: Tensor
    tau: float
    used: int = 1
    data_range: float | None = 1.0
    refine_failures: bool = False
    num_rows: int = field(default=0, init=False)
    num_calls: int = field(default=0, init=False)
    _encoded: dict[str, Any] = field(default_factory=dict, init=False)

    def localise(self, caption: str) -> Answer:
        """Returns the neurons of one caption."""
        rows, calls = self.num_rows, self.num_calls
        answer = self._localise(caption)
        answer.num_rows, answer.num_calls = self.num_rows - rows, self.num_calls - calls
        return answer

    def _localise(self, caption: str) -> Answer:
        before = self._noise_difference(caption, frozenset())
        kept = [seed for seed, level in enumerate(self._consistency(before)) if level > self.tau]
        if not kept:
            return Answer("not_memorised")

        def score(off: frozenset[int], unblocked: Tensor = before) -> float:
            after = self._noise_difference(caption, off)
            return float(self._similarity(unblocked[kept], after[kept]).max())

        layers, initial, level = [], frozenset(), 1.0
        index = 0
        for index, theta in enumerate(THETAS):
            layers = self._candidates(self._activations(caption), theta, index)
            initial = _together(layers)
            level = score(initial)
            if level <= self.tau:
                break
        reached = level <= self.tau
        if not reached and not self.refine_failures:
            return Answer("not_localised", initial, rounds=len(THETAS), score=level)
        threshold = self.tau if reached else level
        before = self._noise_difference(caption, frozenset())  # refinement is a program of its own
        score(initial, before)
        refined = _together(refine_plainly(layers, threshold, lambda off: score(off, before)))
        status = "localised" if reached else "not_localised"
        return Answer(status, initial, refined, index + 1, score(refined, before))

    def _candidates(self, activations: Tensor, theta: float, k: int) -> Layers:
        z = (activations - self.mean) / self.sd
        layers, start = [], 0
        for name in self.modules:
            width = self.model.backbone.get_submodule(name).out_features
            own = slice(start, start + width)
            outliers = [start + int(i) for i in (z[own].abs() > theta).nonzero().flatten()]
            top = [start + int(i) for i in activations[own].argsort(descending=True)[:k]]
            layers.append(outliers + top)
            start += width
        return layers

    def _activations(self, caption: str) -> Tensor:
        """Runs the whole network once and listens to the value projections."""
        heard: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for name in self.modules:
                handle = self.model.backbone.get_submodule(name).register_forward_hook(_listening(heard, name))
                stack.callback(handle.remove)
            self._run(caption, self.noise[:1], self._timesteps()[0])
        return torch.cat([heard[name][0].abs().double().mean(0) for name in self.modules])

    def _noise_difference(self, caption: str, off: frozenset[int]) -> Tensor:
        with ExitStack() as stack:
            start = 0
            for name in self.modules:
                module = self.model.backbone.get_submodule(name)
                width = module.out_features
                channels = [number - start for number in off if start <= number < start + width]
                if channels:
                    stack.callback(module.register_forward_hook(_zeroing(channels)).remove)
                start += width
            outputs = [self._run(caption, self.noise, t) for t in self._timesteps()]
        delta = outputs[self.used] - self.noise
        low, high = delta.amin((2, 3), keepdim=True), delta.amax((2, 3), keepdim=True)
        return (delta - low) / (high - low)

    @torch.no_grad()
    def _run(self, caption: str, x_t: Tensor, t: float) -> Tensor:
        self.num_calls += 1
        self.num_rows += len(x_t)
        if caption not in self._encoded:
            self._encoded = {caption: self.model.prompts([caption])}
        cond = {key: value.expand(len(x_t), *value.shape[1:]) for key, value in self._encoded[caption].items()}
        return self.model.denoiser(x_t, torch.full((len(x_t),), t), cond).noise

    def _timesteps(self) -> list[float]:
        return self.model.denoiser.schedule.timesteps(50)[:2].tolist()

    def _consistency(self, deltas: Tensor) -> list[float]:
        seeds = range(len(deltas))
        pairs = [(i, j) for i in seeds for j in seeds if i < j]
        a, b = (deltas[[pair[side] for pair in pairs]] for side in (0, 1))
        values = self._similarity(a, b).tolist()
        return [max(v for pair, v in zip(pairs, values, strict=True) if seed in pair) for seed in seeds]

    def _similarity(self, a: Tensor, b: Tensor) -> Tensor:
        scales = 3 if min(a.shape[-2:]) >= 44 else 2
        if self.data_range is None:
            return reference_similarity(a, b)
        value = ms_ssim(a, b, kernel_size=11, betas=(0.33,) * scales, reduction="none", data_range=self.data_range)
        return value[0] if isinstance(value, tuple) else value


def _listening(heard: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module: Any, args: Any, output: Tensor) -> None:
        heard[name] = output

    return hook


def _zeroing(channels: list[int]) -> Callable[..., Tensor]:
    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[..., channels] = 0
        return output

    return hook


def _together(layers: Layers) -> frozenset[int]:
    return frozenset(number for layer in layers for number in layer)
