"""Settings of a training, and of measuring its models. Imports no torch, so that a command line starts quickly."""

from dataclasses import dataclass, replace
from typing import Literal

Objective = Literal["flow", "ddpm", "edm", "consistency", "consistency-improved"]
Network = Literal["auto", "unet", "mlp"]


@dataclass(frozen=True)
class TrainSettings:
    """Which model is trained, and for how long.

    Attributes:
        objective: flow: flow matching (velocity, uniform times); ddpm: noise prediction, 1000 steps, linear betas; edm:
            Karras et al. 2022; consistency: consistency training as first published (uniform levels), whose models the
            paper accelerated; consistency-improved: log-normal levels, weighted (Song and Dhariwal 2023).
        network: unet is diffusers' UNet2DModel; mlp is for tiny images; auto takes mlp up to 8x8, unet above.
        width: Number of channels in the U-Net's first level, or of units in the MLP's hidden layers.
        steps: Number of optimizer steps.
        batch_size: Number of images per step over all devices: the pool that noise is assigned in.
        learning_rate: Step size of Adam.
        warmup: Number of steps over which the learning rate rises.
        ema_decay: Upper bound of the moving average's decay.
        class_conditional: Train with the folder's labels as condition.
        normalisation: symmetric maps pixels to [-1, 1]; standard to mean 0 and variance 1 over the data set, where the
            effect of the assignment is largest.
        snapshots: Number of sets of weights that are kept, at steps that double up to the last.
        snapshots_per_doubling: Number of sets that are kept between a step and its double.
        gradient_clip: Largest norm of the gradient; 0 clips nothing.
        checkpoint_every: Number of steps between checkpoints to resume from.

    Raises:
        ValueError: A number is out of its range.

    Example:
        >>> TrainSettings(steps=1000, snapshots=3).snapshot_steps
        [250, 500, 1000]
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
    snapshots_per_doubling: int = 1
    gradient_clip: float = 0.0
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "width", "snapshots", "snapshots_per_doubling", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; give a number of at least 1")
        if not self.learning_rate > 0:
            raise ValueError(f"`learning_rate` is {self.learning_rate}; give a positive number")
        if self.warmup < 0:
            raise ValueError(f"`warmup` is {self.warmup}; give a number of steps, 0 for none")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` is {self.ema_decay}; give a number from 0 to below 1")
        if not self.gradient_clip >= 0:
            raise ValueError(f"`gradient_clip` is {self.gradient_clip}; give a norm, 0 to clip nothing")

    @property
    def snapshot_steps(self) -> list[int]:
        """Steps at which weights are kept: the last, half of it, a quarter …, and steps between, ascending."""
        if self.snapshots_per_doubling == 1:
            return sorted({max(self.steps >> i, 1) for i in range(self.snapshots)})
        ratio = 2 ** (-1 / self.snapshots_per_doubling)
        return sorted({max(round(self.steps * ratio**i), 1) for i in range(self.snapshots)})

    @property
    def consistency(self) -> bool:
        """Whether a consistency function is trained, which samples in one step."""
        return self.objective.startswith("consistency")

    def for_image_size(self, size: int) -> "TrainSettings":
        """Resolves `network="auto"`: an MLP up to 8x8, a U-Net above."""
        if self.network != "auto":
            return self
        return replace(self, network="mlp" if size <= 8 else "unet")


@dataclass(frozen=True)
class EvaluationSettings:
    """How trained models are measured.

    Attributes:
        sampling_steps: Numbers of solver steps; the gain is at few, a loss may be at many. None takes 1 and 2 for a
            consistency function, else 5, 10 and 50.
        num_samples: Number of samples per measurement.
        eta: Share of fresh noise in each solver step; above 0 only a model trained with vanilla noise samples
            correctly.
        sampling_batch: Number of samples per forward pass.

    Raises:
        ValueError: A number is out of its range.
    """

    sampling_steps: tuple[int, ...] | None = None
    num_samples: int = 3000
    eta: float = 0.0
    sampling_batch: int = 1000

    def __post_init__(self) -> None:
        steps = (1,) if self.sampling_steps is None else self.sampling_steps
        if not steps or min(steps) < 1:
            raise ValueError(f"`sampling_steps` is {self.sampling_steps}; give numbers of at least 1")
        if len(set(steps)) < len(steps):
            raise ValueError(f"`sampling_steps` is {self.sampling_steps}; give each number once")
        if self.sampling_batch < 1:
            raise ValueError(f"`sampling_batch` is {self.sampling_batch}; give a number of at least 1")
        if self.num_samples < 2:
            raise ValueError(f"`num_samples` is {self.num_samples}; a Fréchet distance needs at least 2")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"`eta` is {self.eta}; give a number from 0 (deterministic) to 1 (ancestral)")

    def steps_for(self, training: TrainSettings) -> tuple[int, ...]:
        """Returns the numbers of solver steps that a model of this training is sampled with."""
        if self.sampling_steps is not None:
            return self.sampling_steps
        return (1, 2) if training.consistency else (5, 10, 50)
