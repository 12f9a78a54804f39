"""Images of a model for a person to look at: PNG files and one grid, in a run folder."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffcore.denoiser import Denoiser, GuidedDenoiser, Solver, sample
from diffcore.errors import UserError, printable
from diffcore.models.model import DiffusionModel
from diffcore.models.probe import sample_shape
from diffcore.noise import row_noise
from diffcore.report import image_grid
from diffcore.run import Run


def draw_images(
    model: DiffusionModel,
    run: Run,
    prompts: Sequence[str],
    *,
    count: int,
    seed: int,
    steps: int,
    solver: Solver,
    guidance_scale: float,
    size: int | None,
) -> dict[str, Any]:
    """Samples `count` images per prompt, one prompt a batch; finished prompts are not drawn again.

    Args:
        model: Loaded.
        run: Where parts and figures go.
        prompts: Empty for a model that takes none.
        count: Images per prompt, or in all without prompts.
        seed: Image i starts from noise of (seed, i).
        steps: Solver steps.
        solver: As in `denoiser.sample`.
        guidance_scale: 1 is off.
        size: Side in pixels; None is what the model was trained for.

    Returns:
        The figures of `result.json`, the truncated prompts among them.

    Raises:
        UserError: As `planned_images`.
    """
    planned_images(model, prompts, count=count, steps=steps, guidance_scale=guidance_scale, size=size)
    shape = sample_shape(model, size)
    device = next(model.backbone.parameters()).device
    noise = row_noise(seed, range(count), shape, device=device)
    truncated = []
    images: list[Tensor] = []
    for index in range(max(len(prompts), 1)):
        key = f"images-{index:04d}"
        cond, lost = _condition(model, prompts, index, count)
        truncated += [{"prompt": printable(prompts[index]), "lost": printable(lost)}] if lost else []
        if run.missing([key]):
            denoiser = _guided(model, guidance_scale, count)
            x0 = sample(denoiser, noise, cond, steps=steps, solver=solver)
            run.save(key, {"images": model.codec.decode(x0).cpu()})
        drawn = run.load(key).tensors["images"]
        images.append(drawn)
        for place, image in enumerate(drawn):
            run.figure(f"image-{index:04d}-{place:04d}", image_grid(image[None]))
    run.figure("grid", image_grid(torch.cat(images), columns=count if len(images) > 1 else None))
    height, width = images[0].shape[-2:]
    return {"images": len(images) * count, "pixels": f"{width}x{height}", "truncated": truncated}


def planned_images(
    model: DiffusionModel, prompts: Sequence[str], *, count: int, steps: int, guidance_scale: float, size: int | None
) -> dict[str, Any]:
    """Returns how many images `draw_images` would make, and of which shape; arguments as there.

    Raises:
        UserError: Prompts for a model that takes none, or none for one that does, guidance without prompts, or more
            steps than the model has.
    """
    if bool(prompts) != (model.prompts is not None):
        raise UserError(
            f"{printable(model.name)} takes no prompts; leave them out"
            if prompts
            else f"{printable(model.name)} takes prompts; give one or more"
        )
    if guidance_scale != 1 and model.prompts is None:
        raise UserError("--guidance-scale needs a model that takes prompts; leave it out")
    try:
        model.denoiser.schedule.timesteps(steps)
    except ValueError as error:  # more than the model was trained for, or than its scheduler takes
        raise UserError(f"{printable(model.name)} cannot be sampled so: {printable(error, 300)}") from error
    shape = sample_shape(model, size)
    return {"images": max(len(prompts), 1) * count, "shape_of_x0": "x".join(map(str, shape))}


def _condition(model: DiffusionModel, prompts: Sequence[str], index: int, count: int) -> tuple[dict[str, Tensor], str]:
    if model.prompts is None:
        cond = model.empty_condition(count)
        if "class_labels" in cond:
            config: Any = model.backbone.config
            classes = config.get("num_class_embeds") or config.get("num_embeds_ada_norm")
            cond["class_labels"] = torch.arange(count, device=cond["class_labels"].device) % int(classes)
        return cond, ""
    tokens = model.prompts.tokenize([prompts[index]] * count)
    return dict(model.prompts.encode(tokens)), tokens.lost[0]


def _guided(model: DiffusionModel, guidance_scale: float, count: int) -> Denoiser:
    if guidance_scale == 1 or model.prompts is None:
        return model.denoiser
    return GuidedDenoiser(model.denoiser, guidance_scale, model.prompts.unconditional(1))
