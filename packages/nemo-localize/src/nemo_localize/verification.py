"""What verification found: the checks of every prompt, and the verdict that follows by the protocol.

Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from nemo_localize import protocol

Verdict = Literal["open", "inconclusive", "closed"]
Kind = Literal["held-out seeds", "paraphrases", "dropped tokens", "search from caption", "search from noise"]
_WORST_FIRST = ("open", "inconclusive", "closed")


@dataclass(frozen=True)
class Check:
    """One kind of test of a prompt on one model: images, and how similar to the training image they are.

    Attributes:
        edited: Whether the edited model generated the images; else the unedited one did.
        kind: Kind of test, as in `protocol`.
        similarity: Likeness of the image most similar to the training image.
        copies: Number of images that are copies.
        n: Number of images in the test.
        worst: Origin of the most similar image: a seed, a wording, a token left out, or a start of the search.
    """

    edited: bool
    kind: Kind
    similarity: float
    copies: int
    n: int
    worst: str


@dataclass(frozen=True)
class CaptionVerification:
    """The checks of one prompt.

    Attributes:
        prompt: Prompt that was tested.
        target: Kind of image that others were compared with: "training image", or where none was given "unedited
            model's image", the one most similar to its others.
        residual_consistency: Largest similarity between two seeds' first steps after the edit.
        tau: Threshold of that consistency, from 0 to 1.
        checks: Checks of the edited model, and for prompts that are no controls also of the unedited one.
    """

    prompt: str
    target: str
    residual_consistency: float
    tau: float
    checks: tuple[Check, ...]

    @property
    def open(self) -> bool:
        """Whether the edited model generated a copy."""
        return any(check.copies for check in self.checks if check.edited)

    @property
    def known_leak(self) -> bool:
        """Whether the unedited model generated a copy."""
        return any(check.copies for check in self.checks if not check.edited)

    @property
    def reopened(self) -> bool:
        """Whether the search found the leak on the unedited model from noise, without the prompt."""
        return any(check.copies for check in self.checks if not check.edited and check.kind == "search from noise")

    @property
    def verdict(self) -> Verdict:
        """What the protocol says about this prompt."""
        if self.open:
            return "open"
        return "closed" if self.known_leak and self.residual_consistency <= self.tau else "inconclusive"

    @property
    def similarity(self) -> float:
        """The largest likeness of an image of the edited model to the training image."""
        return max(check.similarity for check in self.checks if check.edited)

    def row(self) -> dict[str, Any]:
        """Returns the prompt as a row of a table."""
        row: dict[str, Any] = {
            "prompt": self.prompt,
            "verdict": self.verdict,
            "similarity": self.similarity,
            "residual_consistency": self.residual_consistency,
        }
        for check in self.checks:
            name = f"{'edited' if check.edited else 'unedited'}, {check.kind}"
            row |= {name: check.similarity, f"{name}, copies": f"{check.copies} of {check.n}"}
        return row | {"target": self.target, "worst": self.worst}

    @property
    def worst(self) -> str:
        """The origin of the edited model's most similar image."""
        check = max((check for check in self.checks if check.edited), key=lambda check: check.similarity)
        return f"{check.kind}: {check.worst}"

    def to_json(self) -> dict[str, Any]:
        """Returns the prompt's checks as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> "CaptionVerification":
        """Returns the checks that `to_json` wrote."""
        return cls(**{**row, "checks": tuple(Check(**check) for check in row["checks"])})


@dataclass(frozen=True)
class Verification:
    """Whether a leak is closed, and what that rests on.

    Attributes:
        captions: Memorised prompts whose leaks were tested.
        controls: Prompts that were never memorised.
        likeness: Name of the measure of likeness.
        source: Network and preprocessing of that measure.
        settings: Settings that images were generated with.
    """

    captions: tuple[CaptionVerification, ...]
    controls: tuple[CaptionVerification, ...]
    likeness: str
    source: str
    settings: Mapping[str, Any]

    @property
    def reasons(self) -> tuple[str, ...]:
        """Reasons why verification as a whole is inconclusive; empty where it is not."""
        found = []
        opened = [control.prompt for control in self.controls if control.open]
        if opened:
            found.append(
                f"{len(opened)} of {len(self.controls)} controls opened, so a hit means nothing: {opened[0]!r}"
            )
        known = [caption for caption in self.captions if caption.known_leak]
        reopened = sum(caption.reopened for caption in known)
        if not known:
            found.append("the unedited model generates no copy of any prompt, so there was no leak to close")
        elif reopened < protocol.LEAST_REOPENED * len(known):
            found.append(
                f"from noise the search finds {reopened} of {len(known)} known leaks again, so a miss means nothing"
            )
        return tuple(found)

    @property
    def verdict(self) -> Verdict:
        """What the protocol says: only "closed" is good news."""
        if self.reasons:
            return "inconclusive"
        verdicts = {caption.verdict for caption in self.captions}
        return next(verdict for verdict in _WORST_FIRST if verdict in verdicts)

    @property
    def exit_code(self) -> int:
        """0 where the leak is closed, else 1."""
        return 0 if self.verdict == "closed" else 1

    def ranked(self) -> list[CaptionVerification]:
        """Returns the prompts, worst first."""
        return sorted(self.captions, key=lambda caption: (_WORST_FIRST.index(caption.verdict), -caption.similarity))

    def rows(self) -> list[dict[str, Any]]:
        """Returns a table: prompts worst first, then the controls."""
        captions = [caption.row() for caption in self.ranked()]
        controls = [
            control.row() | {"verdict": "control opened" if control.open else "control"} for control in self.controls
        ]
        # Controls lack the columns of the unedited model.
        return captions + [dict.fromkeys(captions[0]) | control for control in controls]

    def summary(self) -> dict[str, Any]:
        """Returns the verdict in figures."""
        verdicts = [caption.verdict for caption in self.captions]
        return {
            "verdict": self.verdict,
            "reasons": list(self.reasons),
            **{verdict: verdicts.count(verdict) for verdict in _WORST_FIRST},
            "known_leaks": sum(caption.known_leak for caption in self.captions),
            "reopened_from_noise": sum(caption.reopened for caption in self.captions),
            "controls": len(self.controls),
            "controls_opened": sum(control.open for control in self.controls),
            "likeness": self.likeness,
            "source": self.source,
        }

    def to_json(self) -> dict[str, Any]:
        """Returns everything as plain values."""
        return self.summary() | {
            "settings": dict(self.settings),
            "protocol": protocol.described(),
            "captions": [asdict(caption) | {"verdict": caption.verdict} for caption in self.ranked()],
            "controls": [asdict(control) | {"opened": control.open} for control in self.controls],
        }
