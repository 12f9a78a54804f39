"""The comparison to inversion: a free adapter for the same pictures and the same budget (paper, table 4).

Nothing holds it near the members: it is an ordinary fine-tuning by low rank, which may fit its pictures better, drift
from the concept, and cannot be edited.
"""

from collections.abc import Sequence

from diffcore.models import DiffusionModel
from diffcore.units import Map, each_unit
from w2w_space.instance import Instance
from w2w_space.invert import PHOTO, InversionSettings
from w2w_space.layout import Layout
from w2w_space.recipe import Recipe
from w2w_space.train_population import Trained, train_population


def free_adapters(
    layout: Layout,
    model: DiffusionModel,
    subjects: Sequence[Instance],
    settings: InversionSettings = PHOTO,
    *,
    learning_rate: float = 1e-2,
    alpha: float = 1.0,
    group_size: int = 16,
    map: Map = each_unit,
) -> list[Trained]:
    """Trains one free adapter for each subject, with as many steps and noisy pictures as inversion has.

    Args:
        layout: Table of the space's vectors: the same modules and rank.
        model: Base model, whose weights stay as they are.
        subjects: Subjects with their pictures, conditions and masks.
        settings: Settings of the inversion, whose steps, batch size, pairs and seed are taken.
        learning_rate: Largest step of Adam; the paper takes 1e-4 with `alpha` 27.
        alpha: Strength of the changes while training.
        group_size: Number of adapters that are trained together.
        map: Map over subjects that may keep what is finished.

    Raises:
        UserError: There are no subjects, or two have one name.
        IncompatibleModelError: The model lacks modules of the layout, or is compiled or fused.

    Example:
        >>> import torch
        >>> from diffcore.testing import tiny
        >>> from w2w_space.recipe import layout_for
        >>> model = tiny.model("unet2d")
        >>> picture = Instance("me", torch.zeros(1, *model.shape), {"class_labels": torch.tensor([3])})
        >>> layout = layout_for(model, ("to_q",), rank=1)
        >>> (free,) = free_adapters(layout, model, [picture], InversionSettings(steps=2))
        >>> free.vector.shape == (layout.size,)
        True
    """
    recipe = Recipe(
        targets=layout.modules,
        rank=layout.rank,
        alpha=alpha,
        learning_rate=learning_rate,
        steps=settings.steps,
        batch_size=settings.batch_size,
        weight_decay=0.0,
        floor=0.0,
        seed=settings.seed,
    )
    return train_population(
        model,
        subjects,
        recipe,
        layout=layout,
        group_size=group_size,
        num_pairs=settings.num_pairs,
        map=map,
    )
