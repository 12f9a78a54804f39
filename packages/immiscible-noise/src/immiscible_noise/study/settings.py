"""Settings of a training, and of measuring its models. Imports no torch, so that a command line starts quickly."""

from dataclasses import dataclass, replace
from typing import Literal

Objective = Literal["flow", "ddpm", "edm", "consistency", "consistency-improved"]
Network = Literal["auto", "unet", "mlp"]


@dataclass(frozen=True)
class FitSettings:
    """How long a model is trained, and what is kept of it.

    Attributes:
        steps: Number of optimizer steps.
        batch_size: Number of images per step over all devices. Noise is assigned among those of each device, and under
            a coupling with a `window` among those of all.
        warmup: Number of steps over which the learning rate rises.
        ema_decay: Upper bound of the moving average's decay.
        snapshots: Number of sets of weights that are kept, at steps that double up to the last.
        snapshots_per_doubling: Number of sets that are kept between a step and its double.
        gradient_clip: Largest norm of the gradient; 0 clips nothing.
        checkpoint_every: Number of steps between checkpoints to resume from.

    Raises:
        ValueError: A number is out of its range.
    """

    steps: int = 10_000
    batch_size: int = 256
    warmup: int = 0
    ema_decay: float = 0.999
    snapshots: int = 4
    snapshots_per_doubling: int = 1
    gradient_clip: float = 0.0
    checkpoint_every: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "snapshots", "snapshots_per_doubling", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; give a number of at least 1")
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
        return False


@dataclass(frozen=True)
class TrainSettings(FitSettings):
    """Which model is trained from the start, in pixel space, and for how long; further fields are `FitSettings`'s.

    Attributes:
        objective: flow: flow matching (velocity, uniform times); ddpm: noise prediction, 1000 steps, linear betas; edm:
            Karras et al. 2022; consistency: consistency training as first published (uniform levels), whose models the
            paper accelerated; consistency-improved: log-normal levels, weighted (Song and Dhariwal 2023).
        network: unet is diffusers' UNet2DModel; mlp is for tiny images; auto takes mlp up to 8x8, unet above.
        width: Number of channels in the U-Net's first level, or of units in the MLP's hidden layers.
        learning_rate: Step size of Adam.
        class_conditional: Train with the folder's labels as condition.
        normalisation: symmetric maps pixels to [-1, 1]; standard to mean 0 and variance 1 over the data set, where the
            effect of the assignment is largest.

    Raises:
        ValueError: A number is out of its range.

    Example:
        >>> TrainSettings(steps=1000, snapshots=3).snapshot_steps
        [250, 500, 1000]
    """

    objective: Objective = "flow"
    network: Network = "auto"
    width: int = 64
    learning_rate: float = 1e-3
    class_conditional: bool = False
    normalisation: Literal["symmetric", "standard"] = "symmetric"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 1:
            raise ValueError(f"`width` is {self.width}; give a number of at least 1")
        if not self.learning_rate > 0:
            raise ValueError(f"`learning_rate` is {self.learning_rate}; give a positive number")

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
class FineTuneSettings(FitSettings):
    """How a trained model is fine-tuned, and for how long; further fields are `FitSettings`'s.

    Attributes:
        lora_rank: Rank of a LoRA that is trained in place of the network; 0 trains the whole network.
        lora_alpha: Strength of the LoRA in units of its rank; None takes the rank, where all tools agree.
        lora_targets: Ends of the names of the layers that the LoRA changes; by default the projections of attention.
        learning_rate: Step size of AdamW; None takes 1e-5 for a whole network and 1e-4 for a LoRA.
        weight_decay: Decoupled weight decay of AdamW.
        caption_dropout: Share of the visits in which an image comes without its caption, for classifier-free guidance.
        gradient_checkpointing: Keep few activations, and compute the others again in the backward pass: less memory,
            more time, the same weights.

    Raises:
        ValueError: A number is out of its range.

    Example:
        >>> FineTuneSettings(lora_rank=16).peak, FineTuneSettings().peak
        (0.0001, 1e-05)
    """

    steps: int = 1000
    batch_size: int = 16
    gradient_clip: float = 1.0
    lora_rank: int = 0
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    learning_rate: float | None = None
    weight_decay: float = 0.01
    caption_dropout: float = 0.0
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_rank < 0:
            raise ValueError(f"`lora_rank` is {self.lora_rank}; give a rank, 0 to train the whole network")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise ValueError(f"`lora_alpha` is {self.lora_alpha}; give a positive number")
        if not self.lora_targets:
            raise ValueError("`lora_targets` names no layer; give at least one, such as to_q")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"`learning_rate` is {self.learning_rate}; give a positive number")
        if not self.weight_decay >= 0:
            raise ValueError(f"`weight_decay` is {self.weight_decay}; give a number of at least 0")
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"`caption_dropout` is {self.caption_dropout}; give a share from 0 to below 1")

    @property
    def peak(self) -> float:
        """The learning rate after its rise."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1e-4 if self.lora_rank else 1e-5


@dataclass(frozen=True)
class EvaluationSettings:
    """How trained models are measured.

    Attributes:
        sampling_steps: Numbers of solver steps; the gain is at few, a loss may be at many; by default 1 and 2 for a
            consistency function, else 5, 10 and 50.
        num_samples: Number of samples per measurement; by default 3000, and 500 for a model with a codec.
        eta: Share of fresh noise in each solver step; above 0 only a model trained with vanilla noise samples
            correctly.
        guidance: Strength of classifier-free guidance, for models that were fine-tuned with captions; 1 is off.
        sampling_batch: Number of samples per forward pass; by default 1000, and 16 for a model with a codec.

    Raises:
        ValueError: A number is out of its range.
    """

    sampling_steps: tuple[int, ...] | None = None
    num_samples: int | None = None
    eta: float = 0.0
    guidance: float = 1.0
    sampling_batch: int | None = None

    def __post_init__(self) -> None:
        steps = (1,) if self.sampling_steps is None else self.sampling_steps
        told = " ".join(map(str, steps)) or "empty"
        if not steps or min(steps) < 1:
            raise ValueError(f"`sampling_steps` is {told}; give numbers of at least 1")
        if len(set(steps)) < len(steps):
            raise ValueError(f"`sampling_steps` is {told}; give each number once")
        if self.sampling_batch is not None and self.sampling_batch < 1:
            raise ValueError(f"`sampling_batch` is {self.sampling_batch}; give a number of at least 1")
        if self.num_samples is not None and self.num_samples < 2:
            raise ValueError(f"`num_samples` is {self.num_samples}; a Fréchet distance needs at least 2")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"`eta` is {self.eta}; give a number from 0 (deterministic) to 1 (ancestral)")
        if not self.guidance >= 0:
            raise ValueError(f"`guidance` is {self.guidance}; give a strength of at least 0, 1 for none")

    def steps_for(self, training: FitSettings) -> tuple[int, ...]:
        """Returns the numbers of solver steps that a model of this training is sampled with."""
        if self.sampling_steps is not None:
            return self.sampling_steps
        return (1, 2) if training.consistency else (5, 10, 50)
