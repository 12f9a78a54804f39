"""One forward pass of a diffusion model, from which activations are taken as maps; it ends at the last of them.

The noisy input is x_t = alpha_t x0 + sigma_t noise, with the model's own schedule in float32. A row's noise depends on
the seed, on the image and on the number of the draw alone, so that a row's activations do not depend on its batch.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from diffcore.hooks import capture
from diffcore.models import DiffusionModel
from diffcore.noise import row_noise
from diffusion_featsel.activation import Activation

Condition = Mapping[str, Tensor]
Reduce = Callable[[str, Tensor], Tensor | None]


def noised(
    model: DiffusionModel, x0: Float[Tensor, "b *data"], keys: Sequence[int], t: float, *, seed: int = 0, draw: int = 0
) -> Float[Tensor, "b *data"]:
    """Returns x_t: images in the model's space with noise of one timestep.

    Args:
        model: The diffusion model, whose schedule sets the noise level.
        x0: Encoded images.
        keys: One number per image that tells it from all others, such as a digest of its pixels.
        t: Timestep, in the units of the model's schedule.
        seed: Seed of the noise.
        draw: Number of the draw; each draw has independent noise.
    """
    noise = row_noise(seed, keys, x0.shape[1:], stream=draw, device=x0.device, dtype=torch.float32)
    times = torch.full((len(x0),), float(t), device=x0.device)
    return model.denoiser.schedule.add_noise(x0.float(), noise, times).to(x0.dtype)


def activations_of(
    model: DiffusionModel,
    x_t: Float[Tensor, "b *data"],
    t: float,
    condition: Condition,
    activations: Sequence[Activation],
    *,
    reduce: Reduce | None = None,
    stop: bool = True,
    grad: bool = False,
) -> dict[str, Tensor]:
    """Runs the network on noisy inputs, and returns the activations as maps by the paper's names.

    Args:
        model: The diffusion model.
        x_t: Noisy inputs.
        t: Their timestep.
        condition: Condition of the backbone; each tensor has one row for all inputs, or one for each.
        activations: What to take; all were listed by `inventory` for this size of x_t.
        reduce: Called in the hook as (name, map); its result is kept instead of the map, and None keeps nothing.
        stop: Whether the pass ends at the last activation.
        grad: Whether to keep the graph, so that gradients flow back to x_t and to the weights.

    Raises:
        NoMatchError: The network did not run the module of an activation.
        IncompatibleModelError: The network is compiled, or sharded, so that its modules cannot be seen.
    """
    by_site = {activation.site.key: activation for activation in activations}

    def kept(key: str, tensor: Tensor) -> Tensor | None:
        activation = by_site[key]
        places = activation.map(tensor)
        return places if reduce is None else reduce(activation.name, places)

    times = torch.full((len(x_t),), float(t), device=x_t.device)
    cond = {k: v.expand(len(x_t), *v.shape[1:]) if len(v) == 1 else v for k, v in condition.items()}
    sites = [activation.site for activation in by_site.values()]
    with torch.set_grad_enabled(grad), capture(model.backbone, sites, reduce=kept, stop=stop, grad=grad) as found:
        model.denoiser(x_t, times, cond)
    if reduce is not None:
        return {by_site[key].name: value for key, value in found.items()}
    return {activation.name: found[key] for key, activation in by_site.items()}
