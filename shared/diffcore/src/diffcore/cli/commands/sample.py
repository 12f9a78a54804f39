"""`diffcore sample`: generating images as PNG files and one grid."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffcore.cli.app import settings
from diffcore.cli.job import Job
from diffcore.cli.options import LoadingAny, Output, load_model
from diffcore.errors import UserError, printable
from diffcore.runtime import Runtime

if TYPE_CHECKING:
    from diffcore.models import DiffusionModel
    from diffcore.run import Run


def sample(
    model: str,
    prompts: tuple[str, ...] = (),
    *,
    steps: int = 50,
    solver: Literal["ddim", "euler", "heun"] = "ddim",
    guidance_scale: float = 1.0,
    count: int = 1,
    size: int | None = None,
    adapter: Path | None = None,
    adapter_scale: float = 1.0,
    loading: LoadingAny = LoadingAny(),
    runtime: Runtime = Runtime(),
    output: Output = Output(),
) -> int:
    """Generate images and write them as PNG files and one grid.

    Shortest form: diffcore sample FOLDER 'a portrait of a woman' --guidance-scale 7.5

    Image i of a prompt starts from noise that depends on the seed and i alone.

    Args:
        model: Pipeline folder, backbone folder, or safetensors file.
        prompts: One or more prompts; a model without prompts generates its classes in turn.
        steps: Number of solver steps, at least 1.
        solver: Method of the solver steps.
        guidance_scale: Scale of classifier-free guidance; 0 and 1 are off.
        count: Number of images per prompt.
        size: Side of the images in pixels; by default the size that the model was trained for.
        adapter: LoRA to fuse in: a safetensors file, or a folder of PEFT.
        adapter_scale: Strength of the adapter; 1 is what it was trained for.
    """
    if steps < 1 or count < 1:
        raise UserError(f"`steps` is {steps} and `count` is {count}; both must be at least 1")
    guidance_scale = guidance_scale or 1.0  # at 0 the formula would leave the prompt out
    loaded = load_model(model, loading, runtime)
    if adapter is not None:
        loaded = loaded.with_adapter(adapter, adapter_scale)
    options: dict[str, Any] = {"steps": steps, "solver": solver, "guidance_scale": guidance_scale, "size": size}
    fused = {} if adapter is None else {"adapter": adapter, "adapter_scale": adapter_scale}
    config = settings(prompts=list(prompts), count=count, **options, **fused, loading=loading, runtime=runtime)
    folder = output.out or Path("runs") / f"sample-{loaded.name}"
    _refuse(loaded, prompts, steps, guidance_scale)
    shape = "x".join(map(str, loaded.shape_at(size)))
    plan = {"images": max(len(prompts), 1) * count, "shape_of_x0": shape, "steps": steps}
    job = Job("diffcore sample", folder, output, config, {loaded.name: loaded.fingerprint})
    return job(lambda run, _: _generate(loaded, run, prompts, count, runtime.seed, options), plan=plan)


def _refuse(model: "DiffusionModel", prompts: Sequence[str], steps: int, guidance_scale: float) -> None:
    """Raises UserError where the model cannot generate images with these options."""
    name = printable(model.name)
    if prompts and model.prompts is None:
        raise UserError(f"{name} takes no prompts; leave them out")
    if not prompts and model.prompts is not None:
        raise UserError(f"{name} takes prompts; give one or more")
    if guidance_scale != 1 and model.prompts is None:
        raise UserError("`guidance_scale` needs a model that takes prompts; leave it out")
    try:
        model.denoiser.schedule.timesteps(steps)
    except ValueError as error:  # more than the model was trained for, or than its scheduler takes
        raise UserError(f"{name} cannot be sampled so: {printable(error, 300)}") from error


def _generate(
    model: "DiffusionModel", run: "Run", prompts: Sequence[str], count: int, seed: int, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Generates the images of each prompt that the run does not hold yet, and shows all; returns the summary."""
    import torch

    from diffcore.models import generate
    from diffcore.report import image_grid

    truncated, images = [], []
    for index in range(max(len(prompts), 1)):
        key = f"images-{index:04d}"
        tokens = model.prompts and model.prompts.tokenize([prompts[index]])
        if tokens and tokens.lost[0]:
            truncated.append({"prompt": printable(prompts[index]), "lost": printable(tokens.lost[0])})
        if run.missing([key]):
            what = _classes(model, count, seed, options["size"]) if tokens is None else {"prompts": [prompts[index]]}
            made = generate(model, seed=seed, batch_size=count, **{"seeds": range(count)} | what, **options)
            run.save(key, {"images": made.flatten(0, 1)})
        images.append(run.load(key).tensors["images"])
        for place, image in enumerate(images[-1]):
            run.figure(f"image-{index:04d}-{place:04d}", image_grid(image[None]))
    run.figure("grid", image_grid(torch.cat(images), columns=count if len(images) > 1 else None))
    height, width = images[0].shape[-2:]
    return {"images": len(images) * count, "pixels": f"{width}x{height}", "truncated": truncated}


def _classes(model: "DiffusionModel", count: int, seed: int, size: int | None) -> dict[str, Any]:
    """Returns the class labels that a class-conditional model goes through in turn; nothing for others."""
    import torch

    from diffcore.models.backbones import condition_keys
    from diffcore.noise import row_noise

    if "class_labels" not in condition_keys(model.backbone).required:
        return {}
    config: Any = model.backbone.config
    classes = int(config.get("num_class_embeds") or config.get("num_embeds_ada_norm"))
    noise = row_noise(seed, range(count), model.shape_at(size)).unsqueeze(1)
    return {"labels": torch.arange(count) % classes, "seeds": [0], "noise": noise}
