"""The options that commands share, each described once."""

from dataclasses import dataclass

from cyclopts import Parameter

from diffcore.errors import UserError


@Parameter(name="*", group="Chain", negative="")
@dataclass(frozen=True)
class CorrectionOptions:
    """How samples are corrected.

    Attributes:
        steps: Number of Langevin steps (paper, figure 1: 300).
        level: Ratio sigma / alpha of the noise at which the chain runs.
        gamma_e: Step size of the noise.
        gamma_z: Step size of the latents; 0 leaves them where they are.
        kappa: Variance of the generator's samples, which bounds the step of the latents at low noise.
        student_steps: Number of steps in which the score of the generator's samples is learned first.
        student_batch: Number of samples of each such step.
        student_learning_rate: Learning rate of the score.
    """

    steps: int = 300
    level: float = 0.5
    gamma_e: float = 0.04
    gamma_z: float = 0.01
    kappa: float = 0.25
    student_steps: int = 400
    student_batch: int = 128
    student_learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("steps", "student_steps", "student_batch"):
            if getattr(self, name) < 1:
                raise UserError(f"`{name}` is {getattr(self, name)}; give at least 1")
        if not 0 < self.gamma_e < 1:
            raise UserError(f"`gamma_e` is {self.gamma_e}; it must lie between 0 and 1")
        if not self.gamma_z >= 0 or not self.kappa >= 0:
            raise UserError(f"`gamma_z` is {self.gamma_z} and `kappa` {self.kappa}; they must be at least 0")
        for name in ("level", "student_learning_rate"):
            if not getattr(self, name) > 0:
                raise UserError(f"`{name}` is {getattr(self, name)}; give a positive number")


@Parameter(name="*", group="Planned training", negative="")
@dataclass(frozen=True)
class Planned:
    """What the memory of a training depends on, besides its chain.

    Attributes:
        batch_size: Number of rows in a batch.
        lora_rank: Rank of generator and student score as LoRA on the teacher's weights; 0 for whole networks.
        memory: Memory of the device in GiB, to compare with.
    """

    batch_size: int = 16
    lora_rank: int = 0
    memory: float | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"`batch_size` is {self.batch_size}; give at least 1")
        if self.lora_rank < 0:
            raise UserError(f"`lora_rank` is {self.lora_rank}; give 0 or more")
        if self.memory is not None and not self.memory > 0:
            raise UserError(f"`memory` is {self.memory}; it must be positive")
