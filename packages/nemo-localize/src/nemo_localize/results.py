"""The results of localization, for each prompt and for a list of prompts. Imports no torch."""

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from diffcore.digests import digest_of
from diffcore.errors import printable
from nemo_localize.neurons import NO_NEURONS, NeuronSet

if TYPE_CHECKING:
    from nemo_localize.candidates import Candidates
    from nemo_localize.detect import Look

_NESTED = ("initial", "refined", "consistency", "kept_seeds")
Status = Literal["not_memorised", "undecided", "localized", "not_localized", "error"]


@dataclass(frozen=True)
class CaptionResult:
    """What was found for one prompt.

    Attributes:
        prompt: Prompt that was searched.
        prompt_hash: Digest that names the prompt in files.
        status: not_memorised: no seed is consistent; localized: ablating `initial` takes every consistent seed to tau;
            not_localized: no candidate set does. In an audit images decide what is memorised, and undecided says that
            they do not.
        error: Why there is no result; None where there is one.
        consistency: Consistency of each seed, in order.
        kept_seeds: Seeds whose consistency is above tau.
        theta: Threshold on |z| of the selected candidate set; None where it is infinite.
        k: Number of most active neurons per layer in that set.
        rounds: Number of candidate sets up to the selected one.
        tau: Threshold that scores were compared with.
        tau_ref: Threshold of refinement: tau, or where that was not reached the score of the last set.
        initial: Neurons of the selected candidate set.
        refined: Neurons left after refinement; None where there was none.
        score_initial: Largest similarity of a kept seed to itself, before against after ablating `initial`.
        score_refined: The same score with `refined` ablated.
        residual_consistency: Largest similarity between two seeds with `refined` ablated.
        mitigated: Whether the score and the consistency with `refined` ablated both fell to tau; images may still show
            copies.
        near_ties: Number of decisions so close that they were computed again, alone.
        unet_rows: Number of latents through the U-Net.
        unet_calls: Share in the forward passes, which prompts have in common.
        seconds: Share in the time, in seconds.
        truncated: Whether the text encoder saw less than the whole prompt.
        lost: Part of the prompt that it did not see.
        settings_hash: Digest of all that the result depends on.
    """

    prompt: str
    prompt_hash: str
    status: Status
    error: str | None = None
    consistency: tuple[float, ...] = ()
    kept_seeds: tuple[int, ...] = ()
    theta: float | None = None
    k: int | None = None
    rounds: int = 0
    tau: float = 0.0
    tau_ref: float | None = None
    initial: NeuronSet = NO_NEURONS
    refined: NeuronSet | None = None
    score_initial: float | None = None
    score_refined: float | None = None
    residual_consistency: float | None = None
    mitigated: bool = False
    near_ties: int = 0
    unet_rows: int = 0
    unet_calls: float = 0.0
    seconds: float = 0.0
    truncated: bool = False
    lost: str = ""
    settings_hash: str = ""

    @classmethod
    def looked(
        cls, seeds: Sequence[int], seen: "Look", place: int, prompt: str, tau: float, truncated: bool, lost: str
    ) -> "CaptionResult":
        """Returns the result of a prompt after detection: not memorised, or failed, until neurons are found."""
        error = seen.errors.get(place)
        return cls(
            prompt,
            digest_of(prompt),
            "error" if error else "not_memorised",
            error=error,
            consistency=() if error else tuple(seen.consistency[place]),
            kept_seeds=tuple(seeds[seed] for seed in sorted(seen.above(place, tau))),
            tau=tau,
            near_ties=seen.near_ties.get(place, 0),
            unet_rows=seen.rows[place],
            truncated=truncated,
            lost=lost,
        )

    def selected(self, candidates: "Candidates", index: int, *, reached: bool, score: float) -> "CaptionResult":
        """Returns the result with its initial selection: the candidate set of one round, and what it scores."""
        theta, k = candidates.rounds[index]
        return replace(
            self,
            status="localized" if reached else "not_localized",
            theta=theta if theta < float("inf") else None,
            k=k,
            rounds=index + 1,
            tau_ref=self.tau if reached else score,
            initial=candidates.sites.named(candidates.sets[index]),
            score_initial=score,
        )

    def refined_to(self, neurons: NeuronSet, threshold: float, *, score: float, residual: float) -> "CaptionResult":
        """Returns the result with its refined set, and the consistency that is left with that set ablated."""
        return replace(
            self,
            tau_ref=threshold,
            refined=neurons,
            score_refined=score,
            residual_consistency=residual if len(neurons) else None,
            mitigated=self.status == "localized" and len(neurons) > 0 and residual <= self.tau,
        )

    @property
    def max_consistency(self) -> float | None:
        """The largest similarity between two seeds; None for prompts that failed."""
        return max(self.consistency, default=None)

    def to_json(self) -> dict[str, Any]:
        """Returns the result as plain values."""
        row = {field.name: getattr(self, field.name) for field in fields(self)}
        consistency = {"per_seed": list(self.consistency), "max": self.max_consistency} if self.consistency else None
        refined = None if self.refined is None else self.refined.to_json()
        return row | {"consistency": consistency, "initial": self.initial.to_json(), "refined": refined}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "CaptionResult":
        """Returns the result that `to_json` wrote; what is absent has its default.

        Raises:
            ValueError: A field is unknown, or of another kind.
        """
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(row) - known):
            raise ValueError(f"{printable(unknown[0])} is no field of a result")
        status = str(row.get("status")).replace("localised", "localized")  # as earlier versions spelled it
        if status not in get_args(Status):
            raise ValueError(
                f"status is {printable(row.get('status'))}; it must be one of {', '.join(get_args(Status))}"
            )
        refined = row.get("refined")
        return replace(
            cls(prompt=row["prompt"], prompt_hash=row["prompt_hash"], status="error"),
            **{name: value for name, value in row.items() if name not in _NESTED} | {"status": status},
            kept_seeds=tuple(row.get("kept_seeds", ())),
            consistency=tuple((row.get("consistency") or {}).get("per_seed", ())),
            initial=NeuronSet.from_json(row.get("initial") or {}),
            refined=None if refined is None else NeuronSet.from_json(refined),
        )


@dataclass(frozen=True)
class Results:
    """The results of a list of prompts, in its order.

    Attributes:
        captions: One result for each prompt.
    """

    captions: tuple[CaptionResult, ...]

    def __len__(self) -> int:
        return len(self.captions)

    def __iter__(self) -> Iterator[CaptionResult]:
        return iter(self.captions)

    def __getitem__(self, index: int) -> CaptionResult:
        return self.captions[index]

    def distinct(self) -> list[CaptionResult]:
        """Returns one result for each distinct prompt."""
        return list({result.prompt: result for result in self.captions}.values())

    @property
    def tau(self) -> float:
        """The threshold that the prompts were searched with; 0 without prompts."""
        return self.captions[0].tau if self.captions else 0.0

    @property
    def neurons(self) -> NeuronSet:
        """The neurons of all localized prompts together."""
        return NO_NEURONS.union(*self.by_caption().values())

    def by_caption(self, *, failed: bool = False) -> dict[str, NeuronSet]:
        """Returns the refined neurons of the localized prompts; of failed ones that were refined too, if asked for."""
        wanted = ("localized", "not_localized") if failed else ("localized",)
        return {r.prompt: r.refined for r in self.distinct() if r.status in wanted and r.refined is not None}

    def summary(self) -> dict[str, Any]:
        """Returns counts by status, sizes of the sets, the most frequent neurons, and the cost.

        Every distinct prompt counts once. Sizes are medians with median absolute deviations over localized prompts.
        """
        distinct = self.distinct()
        localized = [r for r in distinct if r.status == "localized" and r.refined is not None]
        sets = [r.refined for r in localized if r.refined is not None]
        layers = Counter(name for neurons in sets for name, _ in neurons)
        frequent = Counter(neuron for neurons in sets for neuron in neurons)
        return {
            "num_captions": len(self),
            "num_distinct": len(distinct),
            "counts": {status: sum(r.status == status for r in distinct) for status in get_args(Status)},
            "mitigated": sum(r.mitigated for r in distinct),
            "truncated": sum(r.truncated for r in distinct),
            "initial_neurons": _spread([len(r.initial) for r in localized]),
            "refined_neurons": _spread([len(neurons) for neurons in sets]),
            "neurons_in_layers": dict(sorted(layers.items())),
            "frequent_neurons": {f"{name}[{index}]": count for (name, index), count in frequent.most_common(20)},
            "near_ties": sum(r.near_ties for r in distinct),
            "unet_rows": sum(r.unet_rows for r in distinct),
            "unet_calls": round(sum(r.unet_calls for r in distinct)),
            "seconds": sum(r.seconds for r in distinct),
        }

    def by_kind(self, kinds: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Returns, for each kind of prompt, counts by status and sizes of sets, as in `summary`.

        Args:
            kinds: Kind of each prompt; others are left out.
        """
        parts = {
            kind: Results(tuple(r for r in self.captions if kinds.get(r.prompt) == kind)).summary()
            for kind in sorted(set(kinds.values()), reverse=True)
        }
        told = ("num_distinct", "counts", "initial_neurons", "refined_neurons")
        return {kind: {name: part[name] for name in told} for kind, part in parts.items()}


def _spread(counts: list[int]) -> dict[str, float] | None:
    if not counts:
        return None
    median = float(statistics.median(counts))
    spread = float(statistics.median(abs(count - median) for count in counts))
    return {"median": median, "mad": spread, "n": float(len(counts))}
