"""All settings that change what is found: the step that is looked at, the search, and the images. Imports no torch."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from diffcore.errors import UserError

PUBLISHED_IMAGE_SEED = 2
FIRST_IMAGE_SEED = 1001

Compat = Literal["none", "published"]
Mitigation = Literal[
    "none",
    "neurons",
    "random-neurons",
    "embedding-adjustment",
    "attention-scaling",
    "random-tokens-1",
    "random-tokens-4",
    "random-tokens-10",
]
"""Remedies against memorisation: none, the found neurons ablated, and what they are compared with."""


@dataclass(frozen=True)
class StepSettings:
    """The denoising step that is looked at, and how its outputs are compared; a threshold fits one set of these.

    Attributes:
        num_seeds: Number of initial latents per prompt, at least 2 (published code: 10).
        first_seed: Seed of the first latent; the others count up. Images that test the result need other seeds.
        steps: Number of solver steps, which fixes the timesteps (published code: 50).
        at_step: Number of the step, from 1, at whose timestep pure noise is denoised. The published code takes the
            second, which tells memories better than the first (benchmarks/results/nemo-timestep.md).
        guidance_scale: Strength of classifier-free guidance; 0 and 1 mean none (paper, appendix B.3).
        compat: published reproduces the authors' code: its second timestep, its similarity with border and data range,
            one draw of noise for all seeds, and guidance with its branches swapped.
    """

    num_seeds: int = 10
    first_seed: int = 1
    steps: int = 50
    at_step: int = 2
    guidance_scale: float = 1.0
    compat: Compat = "none"

    def __post_init__(self) -> None:
        if self.num_seeds < 2:
            raise UserError(f"`num_seeds` is {self.num_seeds}; consistency compares seeds, give at least 2")
        if self.published:
            object.__setattr__(self, "at_step", 2)
        if self.at_step < 1:
            raise UserError(f"`at_step` is {self.at_step}; the first step is 1")
        if self.steps < self.at_step:
            raise UserError(f"`steps` is {self.steps}; step {self.at_step} is looked at, so give at least that many")
        object.__setattr__(self, "guidance_scale", guidance(self.guidance_scale))
        if self.first_seed < 0:
            raise UserError(f"`first_seed` is {self.first_seed}; give 0 or more")

    @property
    def seeds(self) -> range:
        """Seeds of the initial latents."""
        return range(self.first_seed, self.first_seed + self.num_seeds)

    @property
    def published(self) -> bool:
        """Whether the published code is reproduced."""
        return self.compat == "published"


@dataclass(frozen=True)
class SearchSettings:
    """How neurons are searched. The defaults are the published code's: 16 candidate sets, the last at (1.25, 15).

    Attributes:
        theta: First threshold on |z| (paper, appendix D.3).
        theta_step: Amount by which the threshold falls in each round.
        theta_min: Last threshold that is tried. The published code names 1 and stops before it.
        k: Number of most active neurons of each layer that join the candidates in the first round.
        k_step: Number of neurons per layer that join in each further round.
        criterion: outliers selects neurons by |z| alone, top-k by activation alone up to the width of the widest layer.
        scaling_factor: Factor of the neurons' outputs while they are tried; 0 ablates them, 1 would change nothing.
        tau_refinement: Threshold of refinement; by default that of selection.
        relative_refinement: Largest relative change, such as 0.1, of a seed's score from its value with all candidates
            ablated; replaces the threshold (published code, not by default). Searches one prompt at a time.
        give_up_early: Try the largest set first, and stop where it does not suppress, though a smaller set might.
            Without effect where compat is published.
        refine_failures: Refine the sets of prompts that never fell to the threshold, though such results are large and
            arbitrary. Always done where compat is published. Searches one prompt at a time.
        unit_size: Number of prompts that share batches; an interruption loses at most one such group.
    """

    theta: float = 5.0
    theta_step: float = 0.25
    theta_min: float = 1.25
    k: int = 0
    k_step: int = 1
    criterion: Literal["both", "outliers", "top-k"] = "both"
    scaling_factor: float = 0.0
    tau_refinement: float | None = None
    relative_refinement: float | None = None
    give_up_early: bool = True
    refine_failures: bool = False
    unit_size: int = 16

    def __post_init__(self) -> None:
        if not self.theta_step > 0:
            raise UserError(f"`theta_step` is {self.theta_step}; give a positive number")
        if not 0 <= self.theta_min <= self.theta:
            raise UserError(f"`theta_min` is {self.theta_min}; give a number from 0 to `theta` ({self.theta})")
        if self.k < 0 or self.k_step < 0:
            raise UserError(f"`k` is {self.k}, `k_step` is {self.k_step}; neither may be negative")
        if self.criterion == "top-k" and not self.k_step:
            raise UserError("`criterion` top-k never grows with `k_step` 0; give 1 or more")
        require_scaling(self.scaling_factor)
        if self.tau_refinement is not None:
            require_tau(self.tau_refinement, "tau_refinement")
        if self.relative_refinement is not None and not 0 < self.relative_refinement < math.inf:
            raise UserError(f"`relative_refinement` is {self.relative_refinement}; give a positive number, such as 0.1")
        if self.unit_size < 1:
            raise UserError(f"`unit_size` is {self.unit_size}; give at least 1")

    def threshold(self, tau: float) -> float:
        """Returns the threshold of refinement for a prompt whose selection fell to tau."""
        return tau if self.tau_refinement is None else self.tau_refinement

    def rounds(self, widest: int) -> list[tuple[float, int]]:
        """Returns (theta, k) of every round, in order.

        Args:
            widest: Number of neurons in the widest layer.
        """
        if self.criterion == "top-k":
            return [(float("inf"), k) for k in range(self.k, widest + self.k_step, self.k_step)]
        # Multiples, not repeated differences: the last round must not depend on how 0.1 is rounded.
        count = int((self.theta - self.theta_min) / self.theta_step + 1e-9) + 1
        k_step = 0 if self.criterion == "outliers" else self.k_step
        k = 0 if self.criterion == "outliers" else self.k
        return [(self.theta - index * self.theta_step, k + index * k_step) for index in range(count)]


@dataclass(frozen=True)
class ImageSettings:
    """How images are generated.

    Attributes:
        guidance_scale: Strength of classifier-free guidance; 0 and 1 mean none (paper, appendix B.3: 7).
        steps: Number of DDIM steps (published code: 50).
        batch_size: Number of latents per forward pass; guidance doubles them.
        compat: published draws the noise of all images at once, from the first seed, as the authors' code does.
    """

    guidance_scale: float = 7.0
    steps: int = 50
    batch_size: int = 64
    compat: Compat = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "guidance_scale", guidance(self.guidance_scale))


def guidance(scale: float) -> float:
    """Returns the guidance scale, with 1 for 0: the published code writes 0 for no guidance, the formula 1.

    Raises:
        UserError: The scale is NaN or infinite.
    """
    if not math.isfinite(scale):
        raise UserError(f"the guidance scale is {scale}; give a number, 0 or 1 for none")
    return scale or 1.0


def require_tau(tau: float, name: str = "tau") -> None:
    """Raises an error unless a number can be a threshold of similarity.

    Raises:
        UserError: The number is not between 0 and 1.
    """
    if not 0 < tau < 1:
        raise UserError(f"`{name}` is {tau}; similarities are from 0 to 1, and so must be what they are compared with")


def require_scaling(factor: float) -> None:
    """Raises an error where a factor would leave neurons as they are.

    Raises:
        UserError: The factor is 1, NaN or infinite.
    """
    if not math.isfinite(factor) or factor == 1:
        raise UserError(f"`scaling_factor` is {factor}; give a number other than 1, which changes nothing: 0 ablates")


def described(*settings: StepSettings | SearchSettings) -> dict[str, Any]:
    """Returns settings as plain values, for records and digests."""
    return {name: value for group in settings for name, value in asdict(group).items()}
