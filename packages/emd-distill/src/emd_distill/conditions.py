"""Conditions that a generator is trained on: all classes, or all prompts, in turn."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from diffcore.batching import InBatches
from diffcore.denoiser import Condition
from diffcore.errors import UserError, printable
from diffcore.models import DiffusionModel, condition_keys

_ENCODED = 64  # prompts in one call of the text encoder


class InTurn:
    """The rows of a table of conditions, all in turn, in an order that the seed fixes.

    Args:
        table: Keyword tensors of the backbone, one row for each condition.
        batch_size: Number of rows of an iteration, over all processes.
        seed: Seed of the order.

    Example:
        >>> turn = InTurn({"class_labels": torch.arange(3)}, batch_size=2, seed=0)
        >>> drawn = torch.cat([turn(step, torch.arange(2))["class_labels"] for step in range(3)])
        >>> sorted(drawn.tolist())
        [0, 0, 1, 1, 2, 2]
    """

    def __init__(self, table: Condition, batch_size: int, seed: int) -> None:
        count = len(next(iter(table.values())))
        self.table, self.batch_size = dict(table), batch_size
        self._order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self._order)

    def __call__(self, step: int, rows: Int[Tensor, " b"]) -> Condition:
        """Returns the conditions of an iteration.

        Args:
            step: Number of finished iterations.
            rows: Places of the rows in the whole batch.
        """
        if self._order.device != rows.device:  # moved once, and not at each call
            self._order = self._order.to(rows.device)
            self.table = {name: value.to(rows.device) for name, value in self.table.items()}
        chosen = self._order[(rows + step * self.batch_size) % len(self._order)]
        return {name: value[chosen] for name, value in self.table.items()}


def condition_table(model: DiffusionModel, prompts: Sequence[str] = ()) -> Condition:
    """Returns all conditions that a generator is trained on: a row for each class or prompt; none for other models.

    Args:
        model: Model that is distilled.
        prompts: Prompts, for a model that takes them; each is encoded once.

    Raises:
        UserError: The model takes prompts and none were given, or the other way round.

    Example:
        >>> from diffcore.testing import tiny
        >>> condition_table(tiny.model("unet2d"))["class_labels"].tolist()
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    name = printable(model.name)
    if model.prompts is not None:
        if not prompts:
            raise UserError(f"{name} takes prompts; give `prompts`")
        with torch.no_grad():
            parts = list(InBatches(_ENCODED)(list(prompts), model.prompts))
        return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    if prompts:
        raise UserError(f"{name} takes no prompts; leave them out")
    required = condition_keys(model.backbone).required
    if not required:
        return {}
    if required != ("class_labels",):
        raise UserError(f"{name} takes {', '.join(required)} and came without text encoders; give its pipeline folder")
    return {"class_labels": torch.arange(num_classes(model))}


def num_classes(model: DiffusionModel) -> int:
    """Returns the number of classes of a class-conditional model.

    Args:
        model: Model that takes class labels.
    """
    config: Any = model.backbone.config
    return int(config.get("num_class_embeds") or config.get("num_embeds_ada_norm"))
