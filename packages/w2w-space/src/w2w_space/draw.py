"""What adapters draw: pictures for the same prompts or classes, from the same noise, one adapter after another."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from diffcore.models import DiffusionModel, generate
from diffcore.models.codec import PixelCodec
from w2w_space.bank import bank
from w2w_space.layout import Layout

_CLIP = 1.2  # bound on predicted pixels, whose data lie in [-1, 1]


@dataclass(frozen=True)
class Drawing:
    """What is drawn and how; the same noise for all adapters.

    Attributes:
        prompts: Prompts, for models that take such.
        labels: Numbers of classes, for models that draw classes.
        seeds: Seeds of the initial noise, one picture for each.
        guidance_scale: Strength of classifier-free guidance, for models that take prompts; 1 is off.
        steps: Number of DDIM steps for each picture.
        size: Side in pixels; by default what the model was trained for.
    """

    prompts: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    seeds: tuple[int, ...] = (0,)
    guidance_scale: float = 2.5
    steps: int = 30
    size: int | None = None


def draw(
    model: DiffusionModel,
    layout: Layout,
    vectors: Sequence[Float[Tensor, " size"] | None],
    drawing: Drawing,
    *,
    batch_size: int = 8,
    on_adapter: Callable[[int], None] | None = None,
) -> Float[Tensor, "n pictures c h w"]:
    """Returns the pictures that each adapter draws: for each prompt or class those of all seeds, one after another.

    Args:
        model: Base model of the adapters.
        layout: Table of the vectors.
        vectors: Vectors of the adapters to draw with; None draws with the base model alone.
        drawing: Prompts or classes, seeds and steps.
        batch_size: Number of pictures that are drawn together; halved where memory runs out.
        on_adapter: Called after each adapter with how many are done.

    Raises:
        ValueError: The model needs prompts or classes, and there are none.

    Example:
        >>> from diffcore.testing import tiny
        >>> from w2w_space.recipe import layout_for
        >>> model = tiny.model("dit")
        >>> layout = layout_for(model, ("to_q",), rank=1)
        >>> shown = draw(model, layout, [None, torch.ones(layout.size)], Drawing(labels=(1, 2), steps=2))
        >>> tuple(shown.shape), bool((shown[0] == shown[1]).all())
        ((2, 2, 3, 16, 16), False)
    """
    told = {"prompts": list(drawing.prompts) or None, "labels": list(drawing.labels) or None}
    clip = _CLIP if isinstance(model.codec, PixelCodec) else None

    def pictures() -> Tensor:
        return generate(
            model,
            **told,  # pyright: ignore[reportArgumentType]
            seeds=drawing.seeds,
            guidance_scale=drawing.guidance_scale if drawing.prompts else 1.0,
            steps=drawing.steps,
            size=drawing.size,
            clip_x0=clip,
            batch_size=batch_size,
        ).flatten(0, 1)

    done = []
    for number, vector in enumerate(vectors, 1):
        if vector is None:
            done.append(pictures())
        else:
            # A bank of one adapter holds for every row, those of guidance too.
            with bank(model.backbone, layout, vector[None].to(model.device)):
                done.append(pictures())
        if on_adapter is not None:
            on_adapter(number)
    return torch.stack(done)
