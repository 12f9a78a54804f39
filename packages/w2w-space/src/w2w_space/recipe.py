"""The recipe by which all members of a population are trained, and the modules that it changes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffcore.digests import digest_of, digest_of_values
from diffcore.errors import IncompatibleModelError, NoMatchError
from diffcore.models import DiffusionModel
from diffcore.noise import philox_uniform
from w2w_space.layout import Layout

_INITIAL = 1  # stream of the draws of A
_SHARED = 0  # row of the A that all members share


@dataclass(frozen=True)
class Recipe:
    """How each member of a population is trained: the same for all, or their vectors do not compare.

    The defaults are the paper's, without its prior preservation.

    Attributes:
        targets: Last parts of the names of the linear modules that are changed, such as to_q.
        rank: Rank of each change.
        alpha: Strength of the changes: they are alpha / rank B A while training; exported vectors have it in B.
        learning_rate: Largest step of Adam for the numbers of A and B.
        steps: Number of steps for each member.
        batch_size: Number of noisy pictures of each member in a step.
        betas: Decay rates of Adam's two moments.
        weight_decay: Decoupled weight decay of AdamW.
        warmup: Number of steps in which the learning rate rises.
        floor: Share of the learning rate at which its cosine ends; 1 keeps it constant.
        clip: Largest norm of one member's gradient; None clips nothing.
        seed: Seed of the initial A, the order of pictures, timesteps and noise.
        init: Whether all members start from the same A (paper), or each from its own, for experiments.

    Raises:
        ValueError: A number is out of its range.

    Example:
        >>> Recipe(steps=100, learning_rate=1e-2).scale
        27.0
    """

    targets: tuple[str, ...] = ("to_q", "to_v")
    rank: int = 1
    alpha: float = 27.0
    learning_rate: float = 1e-4
    steps: int = 800
    batch_size: int = 1
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-2
    warmup: int = 0
    floor: float = 1.0
    clip: float | None = 1.0
    seed: int = 0
    init: Literal["shared", "own"] = "shared"

    def __post_init__(self) -> None:
        for name in ("rank", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}; give at least 1")
        for name in ("alpha", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}; it must be positive")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"`floor` is {self.floor}; it must lie in [0, 1]")
        if self.init not in ("shared", "own"):
            raise ValueError(f"`init` is {self.init!r}; it must be shared or own")

    @property
    def scale(self) -> float:
        """Factor of B A in the change of a weight."""
        return self.alpha / self.rank

    @property
    def digest(self) -> str:
        """Digest of all settings: populations of other recipes do not compare."""
        return digest_of_values(asdict(self))

    def to_json(self) -> dict[str, Any]:
        """Returns the settings as plain values."""
        return asdict(self)


def layout_for(model: DiffusionModel, targets: Sequence[str], rank: int) -> Layout:
    """Returns the table of the modules of a model that a recipe changes.

    Args:
        model: Base model whose backbone the adapters change.
        targets: Last parts of module names, such as to_q or to_out.0.
        rank: Rank of each change.

    Raises:
        NoMatchError: No module of the model has one of these names.
        IncompatibleModelError: A target is neither a linear module nor part of one's name.

    Example:
        >>> from diffcore.testing import tiny
        >>> layout = layout_for(tiny.model("sd15"), ("to_q", "to_v"), rank=1)
        >>> len(layout.modules), layout.modules[0]
        (16, 'down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q')
    """
    shapes = dict[str, tuple[int, ...]]()
    for target in targets:
        found = {
            name: module
            for name, module in model.backbone.named_modules()
            if name == target or name.endswith(f".{target}")
        }
        if not found:
            raise NoMatchError(f"no module of {model.name} is called {target!r}; give the last part of a module's name")
        for name, module in found.items():
            if not isinstance(module, nn.Linear):
                raise IncompatibleModelError(
                    f"{name!r} is a {type(module).__name__}, and adapters are trained in linear modules alone; "
                    f"give targets other than {target!r}"
                )
            shapes[name] = tuple(module.weight.shape)
    return Layout.of(shapes, rank, model.adapter_base.backbone)


def initial_vectors(layout: Layout, recipe: Recipe, names: Sequence[str]) -> Float[Tensor, "n size"]:
    """Returns the members' vectors before training: A uniform within 1 / sqrt(inputs), as PEFT draws it, and B = 0.

    Args:
        layout: Table of the vectors.
        recipe: Recipe whose seed draws A, once for all or once for each name.
        names: Names of the members, on which an own A depends.

    Example:
        >>> layout = Layout.of({"to_q": (2, 4)}, rank=1)
        >>> a = initial_vectors(layout, Recipe(), ["one", "two"])
        >>> bool((a[0] == a[1]).all()), bool((a[:, 4:] == 0).all()), bool(a.abs().max() < 0.5)
        (True, True, True)
    """
    bounds = torch.zeros(layout.size)
    for span, (inputs, _) in zip(layout.spans, layout.sides, strict=True):
        bounds[span.start : span.start + layout.rank * inputs] = inputs**-0.5
    rows = [_SHARED] * len(names) if recipe.init == "shared" else member_rows(names).tolist()
    return (2 * philox_uniform(recipe.seed, rows, (layout.size,), stream=_INITIAL) - 1) * bounds


def member_rows(names: Sequence[str]) -> Tensor:
    """Returns a number for each name, by which its random draws are told from those of others.

    Args:
        names: Names of the members, wherever they stand.
    """
    return torch.tensor([int(digest_of(name)[:8], 16) for name in names], dtype=torch.int64)


def up_numbers(layout: Layout) -> Tensor:
    """Returns which numbers of a vector belong to B.

    Args:
        layout: Table of the vectors.
    """
    mask = torch.zeros(layout.size, dtype=torch.bool)
    for span, (inputs, _) in zip(layout.spans, layout.sides, strict=True):
        mask[span.start + layout.rank * inputs : span.stop] = True
    return mask
