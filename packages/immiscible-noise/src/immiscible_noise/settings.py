"""What a training run is: its arm, its objective and its network. Imports no torch: the command line stays quick."""

from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal

from cyclopts import Parameter

from diffcore.errors import UserError

Method = Literal["vanilla", "assignment", "knn"]
Objective = Literal["flow", "ddpm", "edm"]
Network = Literal["auto", "unet", "mlp"]


@Parameter(name="*", group="Noise", negative="")
@dataclass(frozen=True)
class Arm:
    """How a batch's noise meets its images.

    Attributes:
        method: vanilla keeps the independent draw; assignment permutes the noise inside the batch (the paper); knn
            keeps the nearest of k draws per image (its follow-up).
        strength: Share of each batch that is assigned; 1 is the paper, 0.5 was best on small images.
        cost: Squared (sq) or plain (l2, the paper) distance between image and noise.
        condition: With labels: block exchanges noise only inside a label, ignore over all of the batch (the paper);
            auto is block.
        k: Draws per image (knn).
        score: l2 as published, or inner, which keeps the noise's norm (knn).
    """

    method: Method = "assignment"
    strength: float = 1.0
    cost: Literal["sq", "l2"] = "sq"
    condition: Literal["auto", "block", "ignore"] = "auto"
    k: int = 4
    score: Literal["l2", "inner"] = "l2"

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise UserError(f"--strength is {self.strength}; give a number from 0 (vanilla) to 1 (the paper)")
        if self.k < 1:
            raise UserError(f"--k is {self.k}; give the number of noise draws per image, at least 1")

    @property
    def name(self) -> str:
        """A short name: the preset's where there is one, else the method and what differs from its defaults."""
        for name, preset in PRESETS.items():
            if self == preset:
                return name
        plain = Arm()
        changed = [f for f in fields(self) if f.name != "method" and getattr(self, f.name) != getattr(plain, f.name)]
        return "-".join([self.method, *(f"{f.name}={getattr(self, f.name)}" for f in changed)])


PRESETS: dict[str, Arm] = {
    "vanilla": Arm("vanilla"),
    "assignment": Arm("assignment"),
    "half": Arm("assignment", strength=0.5),
    "ignore": Arm("assignment", condition="ignore"),
    "knn": Arm("knn"),
    "knn-inner": Arm("knn", score="inner"),
}
"""Named arms of `compare`: the paper's, its follow-up's, and ours (half)."""


def arm_named(name: str) -> Arm:
    """Returns a preset by name.

    Raises:
        UserError: There is none of that name.
    """
    if name not in PRESETS:
        raise UserError(f"there is no arm {name!r}; choose from {', '.join(PRESETS)}")
    return PRESETS[name]


@Parameter(name="*", group="Training", negative="")
@dataclass(frozen=True)
class TrainSettings:
    """What is trained and for how long.

    Attributes:
        objective: flow: flow matching (velocity, uniform times); ddpm: noise prediction, 1000 steps, linear betas; edm:
            Karras et al. 2022.
        network: unet is diffusers' UNet2DModel; mlp is for tiny images; auto takes mlp up to 8x8, unet above.
        width: Channels of the U-Net's first level, or of the MLP's hidden layers.
        steps: Optimizer steps.
        batch_size: Images per step over all devices: the pool that noise is assigned in.
        learning_rate: Of Adam.
        warmup: Steps over which the learning rate rises.
        ema_decay: Upper bound of the moving average's decay.
        class_conditional: Train with the folder's labels as condition.
        normalisation: symmetric maps pixels to [-1, 1]; standard to mean 0 and variance 1 over the data set, where the
            effect of the assignment is largest.
        snapshots: How many sets of weights to keep, at steps that double up to the last.
        gradient_clip: Largest gradient norm; 0 clips nothing.
        checkpoint_every: Steps between checkpoints to resume from.
    """

    objective: Objective = "flow"
    network: Network = "auto"
    width: int = 64
    steps: int = 10_000
    batch_size: int = 256
    learning_rate: float = 1e-3
    warmup: int = 0
    ema_decay: float = 0.999
    class_conditional: bool = False
    normalisation: Literal["symmetric", "standard"] = "symmetric"
    snapshots: int = 4
    gradient_clip: float = 0.0
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "width", "snapshots", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; give a number of at least 1")
        if not self.learning_rate > 0:
            raise UserError(f"--learning-rate is {self.learning_rate}; give a positive number")
        if self.warmup < 0:
            raise UserError(f"--warmup is {self.warmup}; give a number of steps, 0 for none")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"--ema-decay is {self.ema_decay}; give a number from 0 to below 1")
        if not self.gradient_clip >= 0:
            raise UserError(f"--gradient-clip is {self.gradient_clip}; give a norm, 0 to clip nothing")

    @property
    def snapshot_steps(self) -> list[int]:
        """Steps at which weights are kept: the last, half of it, a quarter …, ascending."""
        return sorted({max(self.steps >> i, 1) for i in range(self.snapshots)})

    def for_image_size(self, size: int) -> "TrainSettings":
        """Resolves `network="auto"`: an MLP up to 8x8, a U-Net above."""
        if self.network != "auto":
            return self
        return replace(self, network="mlp" if size <= 8 else "unet")


@Parameter(name="*", group="Evaluation")
@dataclass(frozen=True)
class EvaluationSettings:
    """How trained models are measured.

    Attributes:
        sampling_steps: Solver steps to measure at; the gain is at few, a loss may be at many.
        num_samples: Samples per measurement.
        eta: Share of fresh noise in each solver step; above 0 only a model trained with vanilla noise samples
            correctly.
        sampling_batch: Samples per forward pass.
    """

    sampling_steps: Annotated[tuple[int, ...], Parameter(consume_multiple=True, negative="")] = (5, 10, 50)
    num_samples: int = 3000
    eta: float = 0.0
    sampling_batch: int = 1000

    def __post_init__(self) -> None:
        if not self.sampling_steps or min(self.sampling_steps) < 1:
            raise UserError(f"--sampling-steps is {self.sampling_steps}; give numbers of at least 1")
        if len(set(self.sampling_steps)) < len(self.sampling_steps):
            raise UserError(f"--sampling-steps is {self.sampling_steps}; give each number once")
        if self.sampling_batch < 1:
            raise UserError(f"--sampling-batch is {self.sampling_batch}; give a number of at least 1")
        if self.num_samples < 2:
            raise UserError(f"--num-samples is {self.num_samples}; a Fréchet distance needs at least 2")
        if not 0 <= self.eta <= 1:
            raise UserError(f"--eta is {self.eta}; give a number from 0 (deterministic) to 1 (ancestral)")
