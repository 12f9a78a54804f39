"""What an iteration costs: forward passes of the networks, and memory."""

from dataclasses import dataclass

from torch import nn

from emd_distill.losses import EMD, Loss


@dataclass(frozen=True)
class Passes:
    """Passes of the networks in one iteration, each of the rows of a batch.

    Attributes:
        teacher: Number of forward passes of the teacher; under guidance each is of two rows for one.
        student: Number of forward passes of the student score.
        generator: Number of forward passes of the generator.
        input_gradients: Number of backward passes to the input alone, each about as dear as one forward pass.
        weight_gradients: Number of backward passes to the weights, each about as dear as two.
    """

    teacher: int
    student: int
    generator: int
    input_gradients: int
    weight_gradients: int

    @property
    def total(self) -> int:
        """The cost in forward passes of one network."""
        return self.teacher + self.student + self.generator + self.input_gradients + 2 * self.weight_gradients


def passes(
    loss: Loss,
    iteration: int = 0,
    *,
    student_updates: int = 1,
    guided: bool = False,
    student_guided: bool = False,
    accumulation: tuple[int, int] = (1, 1),
) -> Passes:
    """Returns the passes of an iteration of `distill`.

    Args:
        loss: Loss of the generator, of this package.
        iteration: Number of finished iterations, for schedules.
        student_updates: Number of updates of the student score.
        guided: Whether the teacher is guided.
        student_guided: Whether the student score is guided inside chains.
        accumulation: Numbers of batches in one step of the student score and of the generator.

    Example:
        >>> passes(EMD(num_steps=0)).total, passes(EMD(num_steps=16, gamma_z=0.0)).total
        (9, 39)
    """
    each, scored = 2 if guided else 1, 2 if student_guided else 1
    learned, count = student_updates * accumulation[0], accumulation[1]
    drawn = learned + max(count - accumulation[0], 0)  # the last update's samples are the chains'
    gradients = learned + count
    if not isinstance(loss, EMD):  # SiD, whose gradient goes through both scores
        return Passes(each * count, learned + scored * count, drawn + count, (each + scored) * count, gradients)
    steps, moves = loss.steps_at(iteration), loss.gamma_z > 0 and loss.steps_at(iteration) > 0
    ends = steps == 0 or loss.noise_cancel == "stein"  # the drift is taken once more, at the last state
    return Passes(
        teacher=each * count * (steps + ends),
        student=learned + scored * count * (steps + ends),
        generator=drawn + count * (1 + (steps + (steps > 0 and ends) if moves else 0)),
        input_gradients=count * steps if moves else 0,
        weight_gradients=gradients,
    )


def weight_megabytes(teacher: nn.Module, generator: nn.Module, student: nn.Module, *, teacher_bytes: int = 4) -> float:
    """Returns the memory of all weights, gradients, Adam's two moments and the average, without activations.

    Weights that generator and student score share with the teacher are counted once, as the teacher's.

    Args:
        teacher: Network that stays as it is.
        generator: Network that learns and is averaged.
        student: Network that learns, without an average.
        teacher_bytes: Bytes of one of the teacher's weights: 4 in float32, 2 in bfloat16.
    """
    shared = {id(p) for p in teacher.parameters()}

    def learning(network: nn.Module) -> int:
        return sum(p.numel() for p in network.parameters() if p.requires_grad)

    def own(network: nn.Module) -> int:
        return sum(p.numel() for p in network.parameters() if id(p) not in shared)

    weights = 4 * (2 * own(generator) + own(student)) + teacher_bytes * sum(p.numel() for p in teacher.parameters())
    return (weights + 12 * (learning(generator) + learning(student))) / 1e6
