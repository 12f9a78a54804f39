"""What localisation costs against the plain sequential algorithm: rows and calls, which no machine changes, and memory.

    python benchmarks/nemo_reference.py [--captions 64] [--memorised 4] [--batch-size 64] [--smoke]

On U-Nets with planted memories; the neuron sets must be equal. Seconds are printed too: `nemo-localize bench` measures
ratios to the method as the paper writes it. Peak memory is what torch allocates above the start, in a run of its own.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim

from nemo_localize.score import published_similarity

RESULTS = Path(__file__).parent / "results" / "nemo-reference.json"
ONE_CAPTION = (0.45, 1 / 4)  # most rows and calls, as shares of the plain way's
A_LIST = (0.55, 1 / 8)


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
        status: not_memorised, localized or not_localized.
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
class PlainLocalizer:
    """The published algorithm on one model, at the cost of the published code: two timesteps, a whole pass per round.

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

    def localize(self, caption: str) -> Answer:
        """Returns the neurons of one caption."""
        rows, calls = self.num_rows, self.num_calls
        answer = self._localize(caption)
        answer.num_rows, answer.num_calls = self.num_rows - rows, self.num_calls - calls
        return answer

    def _localize(self, caption: str) -> Answer:
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
            return Answer("not_localized", initial, rounds=len(THETAS), score=level)
        threshold = self.tau if reached else level
        before = self._noise_difference(caption, frozenset())  # refinement is a program of its own
        score(initial, before)
        refined = _together(refine_plainly(layers, threshold, lambda off: score(off, before)))
        status = "localized" if reached else "not_localized"
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
            return published_similarity(a, b)
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


@dataclass(frozen=True)
class Comparison:
    """Both ways on the same captions.

    Attributes:
        disagreements: Captions whose status or neuron sets differ.
        rows: Ours, and plain.
        calls: Likewise.
        seconds: Likewise.
        megabytes: Peak memory, likewise; None where it was not asked for.
    """

    disagreements: list[str]
    rows: tuple[int, int]
    calls: tuple[int, int]
    seconds: tuple[float, float]
    megabytes: tuple[float, float] | None = None

    def within(self, limits: tuple[float, float]) -> bool:
        """Returns whether shares of rows and calls are at most these."""
        pairs = zip((self.rows, self.calls), limits, strict=True)
        return all(ours <= limit * plain for (ours, plain), limit in pairs)

    def described(self, name: str) -> list[dict[str, Any]]:
        """Returns the figures that hardly a machine changes, as rows of name, value and unit."""
        rows: list[dict[str, Any]] = []
        for unit, (ours, plain) in self._counts():
            rows += [{"name": f"{name} {unit}", "value": ours, "unit": unit}]
            rows += [{"name": f"{name} reference {unit}", "value": plain, "unit": unit}]
        return [*rows, {"name": f"{name} disagreements", "value": len(self.disagreements), "unit": "captions"}]

    def __str__(self) -> str:
        parts = [
            f"{name} {ours:g} of {plain:g} ({100 * ours / plain:.1f} %)"
            for name, (ours, plain) in [*self._counts(), ("seconds", self.seconds)]
        ]
        return f"{', '.join(parts)}; {len(self.disagreements)} disagreements"

    def _counts(self) -> list[tuple[str, tuple[float, float]]]:
        memory = () if self.megabytes is None else (("MB", self.megabytes),)
        return [("rows", self.rows), ("calls", self.calls), *memory]


def compare(
    model: Any,
    captions: Sequence[str],
    statistics: Any,
    tau: float,
    *,
    batch_size: int = 64,
    num_seeds: int = 10,
    memory: bool = False,
) -> Comparison:
    """Localizes captions in both ways, with the same latents, threshold and statistics."""
    from diffcore.bench import peak_megabytes
    from nemo_localize import FirstStep, SearchSettings, StepSettings, localize

    step = FirstStep(model, StepSettings(num_seeds=num_seeds), batch_size=batch_size)
    plain = PlainLocalizer(
        model, [site.module for site in step.sites.sites], step.noise, statistics.mean, statistics.var.sqrt(), tau
    )
    settings = SearchSettings(unit_size=len(captions))

    def quickly() -> Any:
        return localize(step, captions, tau=tau, statistics=statistics, search=settings)

    def plainly() -> list[Answer]:
        return [plain.localize(caption) for caption in captions]

    start = time.perf_counter()
    ours = quickly()
    middle = time.perf_counter()
    theirs = plainly()
    seconds = (middle - start, time.perf_counter() - middle)
    rows, calls = (step.num_rows, plain.num_rows), (step.num_calls, plain.num_calls)
    disagreements = [
        result.prompt
        for result, answer in zip(ours, theirs, strict=True)
        if (result.status, step.sites.numbers(result.initial), step.sites.numbers(result.refined or result.initial))
        != (answer.status, answer.initial, answer.refined or answer.initial)
    ]
    megabytes = (round(peak_megabytes(quickly), 1), round(peak_megabytes(plainly), 1)) if memory else None
    return Comparison(disagreements, rows, calls, seconds, megabytes)


def main() -> int:
    """Prints and writes the comparison on one hard caption and on a list; 1 where they differ or a limit is missed."""
    from diffcore.io.jsonfile import write_json
    from nemo_localize import collect_statistics
    from nemo_localize.planted import hard_case, list_case, ordinary_captions

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--memorised", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--smoke", action="store_true", help="8 captions, 2 of them memorised; writes nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = (8, 2) if options.smoke else (options.captions, options.memorised)
    written, failed = [], False
    for name, (planted, captions), limits in (
        ("one hard caption", hard_case(), ONE_CAPTION),
        (f"{size[0]} captions, {size[1]} memorised", list_case(*size), A_LIST),
    ):
        statistics = collect_statistics(planted.model, ordinary_captions(500, seed=3))
        found = compare(planted.model, captions, statistics, tau=0.45, batch_size=options.batch_size, memory=True)
        kept = found.within(limits)
        sys.stdout.write(f"{name}: {found}{'' if kept else '; MORE THAN ALLOWED'}\n")
        sys.stdout.flush()
        failed |= bool(found.disagreements) or not kept
        written += found.described(name)
    if not options.smoke:
        write_json(RESULTS, written)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
