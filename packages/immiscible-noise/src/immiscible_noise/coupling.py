"""Which noise an image meets in a training step: a few settings, and the call that carries them out.

Three methods: the independent draw of ordinary training ("vanilla"), the permutation inside the batch that brings noise
near its images (`assign_noise`, Immiscible Diffusion), and the nearest of k draws for each image (`select_noise`, its
follow-up). The module imports torch when a coupling is called, so that a command line starts quickly.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Literal

_SOFT_SHARE = 0.2
"""Share of the other pairs of a batch that may still exchange noise under soft conditions: that of C2OT's code."""

_SETTINGS_OF = {
    "assignment": ("strength", "cost", "condition", "flip", "window", "scope"),
    "knn": ("k", "score"),
}

Preset = Literal["vanilla", "assignment", "half", "ignore", "knn", "knn-inner", "early", "flip"]


@dataclass(frozen=True)
class Coupling:
    """How the noise of a batch meets its images.

    Attributes:
        method: vanilla keeps the independent draw; assignment permutes the noise inside the batch (the paper); knn
            keeps the nearest of k draws per image (its follow-up).
        strength: Share of each batch that is assigned; 1 is the paper, 0.5 was best on small images.
        cost: Squared (sq), plain (l2, the paper) or absolute (l1, slow, the paper's comparison) distance between image
            and noise.
        condition: block exchanges noise only inside a label, soft more readily between like conditions (text), ignore
            over all of the batch (the paper); auto is block where labels are given, soft where conditions are.
        k: Number of draws per image (knn).
        score: l2 as published, or inner, which keeps the noise's norm (knn).
        flip: Negate the assigned noise: each image owns a region still, but the far one (the paper's ablation of
            optimal transport).
        window: Number of upcoming samples over which noise is assigned, for batches that are too small to exchange it;
            0 assigns inside the batch. Trainings read it, as they know what comes; elsewhere build a `NoisePlan`.
        scope: local assigns inside each process's share of a batch; global over the shares of all processes, as one
            process would that held them all. Trainings read it.
        until: Share of the training after which noise is drawn independently again, an ablation. Trainings read it;
            a call of the coupling does not know how far training has come.

    Raises:
        ValueError: `strength`, `k` or `until` is out of its range, soft conditions come with a cost other than sq, the
            scope is global with soft conditions or with a window, which spans all processes anyway, or a setting is one
            of another method.

    Example:
        >>> import torch
        >>> x, noise = torch.randn(16, 3, 8, 8), torch.randn(16, 3, 8, 8)
        >>> half = Coupling("assignment", strength=0.5)
        >>> noise = half(x, noise, labels=torch.arange(16) % 2, generator=torch.Generator().manual_seed(0))
        >>> half.name
        'half'
    """

    method: Literal["vanilla", "assignment", "knn"] = "assignment"
    strength: float = 1.0
    cost: Literal["sq", "l2", "l1"] = "sq"
    condition: Literal["auto", "block", "soft", "ignore"] = "auto"
    k: int = 4
    score: Literal["l2", "inner"] = "l2"
    flip: bool = False
    window: int = 0
    scope: Literal["local", "global"] = "local"
    until: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ValueError(f"`strength` is {self.strength}; give a number from 0 (vanilla) to 1 (the paper)")
        if self.k < 1:
            raise ValueError(f"`k` is {self.k}; give the number of noise draws per image, at least 1")
        if self.condition == "soft" and self.cost != "sq":
            raise ValueError(
                f"`cost` is {self.cost} with soft conditions, which add to squared distances; leave it at sq"
            )
        if self.window < 0:
            raise ValueError(f"`window` is {self.window}; give a number of samples, or 0 to assign inside the batch")
        if self.scope == "global" and (self.window or self.condition == "soft"):
            other = f"`window` is {self.window}" if self.window else "`condition` is soft"
            raise ValueError(f"`scope` is global and {other}, which do not go together; leave `scope` out")
        if not 0 <= self.until <= 1:
            raise ValueError(f"`until` is {self.until}; give a share of the training from 0 to 1")
        for method, names in _SETTINGS_OF.items():
            changed = [name for name in names if getattr(self, name) != getattr(Coupling, name)]
            if changed and self.method != method:
                raise ValueError(
                    f"`{changed[0]}` is {getattr(self, changed[0])}, which method {self.method} does not have; leave "
                    f"it out, or take `method` {method}"
                )

    def __call__(
        self,
        x: Any,
        noise: Any,
        *,
        labels: Any = None,
        conditions: Any = None,
        mask: Any = None,
        generator: Any = None,
    ) -> Any:
        """Returns the noise that each image is diffused towards.

        Args:
            x: Clean batch as the diffusion sees it, a tensor (b, *data).
            noise: Independent Gaussian noise of the same shape, a tensor (b, *data).
            labels: Conditions that the network sees, as for `assign_noise`.
            conditions: Vectors that stand for what the network sees, such as text embeddings, a tensor (b, features);
                in place of labels, for conditions that hardly ever are equal.
            mask: Nonzero where ``x`` is data, as for `assign_noise`.
            generator: Source of the assigned rows (strength below 1) or of the candidates (knn).

        Raises:
            ValueError: The condition is soft without conditions, or `assign_noise` refuses.
        """
        from .assign import assign_noise
        from .select import select_noise
        from .soft import assign_noise_softly

        soft = self.condition == "soft" or (self.condition == "auto" and labels is None and conditions is not None)

        match self.method:
            case "vanilla":
                return noise
            case "knn":
                return select_noise(x, self.k, score=self.score, generator=generator)
            case "assignment" if soft:
                if conditions is None or mask is not None or self.cost != "sq":
                    raise ValueError("soft conditions need `conditions` and squared distances, and take no `mask`")
                own = 1 / max(round(self.strength * len(x)), 1)  # a row and its own noise are one of the pairs
                target = own + _SOFT_SHARE * (1 - own)
                found = assign_noise_softly(
                    x, noise, conditions, target=target, strength=self.strength, generator=generator
                )
                return -found.noise if self.flip else found.noise
            case "assignment":
                assert self.condition != "soft"  # the case above
                assigned = assign_noise(
                    x,
                    noise,
                    labels=labels,
                    mask=mask,
                    cost=self.cost,
                    condition=self.condition,
                    strength=self.strength,
                    generator=generator,
                )
                return -assigned if self.flip else assigned

    @property
    def name(self) -> str:
        """A short name: the preset's where there is one, else the method and what differs from its defaults."""
        for name, preset in PRESETS.items():
            if self == preset:
                return name
        plain = Coupling()
        changed = [f for f in fields(self) if f.name != "method" and getattr(self, f.name) != getattr(plain, f.name)]
        return "-".join([self.method, *(f"{f.name}={getattr(self, f.name)}" for f in changed)])


PRESETS: Mapping[Preset, Coupling] = MappingProxyType(
    {
        "vanilla": Coupling("vanilla"),
        "assignment": Coupling("assignment"),
        "half": Coupling("assignment", strength=0.5),
        "ignore": Coupling("assignment", condition="ignore"),
        "knn": Coupling("knn"),
        "knn-inner": Coupling("knn", score="inner"),
        "early": Coupling("assignment", until=0.5),
        "flip": Coupling("assignment", flip=True),
    }
)
"""The couplings that have names: the paper's, its follow-up's, ours (half), and two ablations (early, flip)."""
