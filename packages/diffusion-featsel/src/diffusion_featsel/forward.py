"""One forward pass of a diffusion model, from which activations are taken as maps; it ends at the last of them.

The noisy input is x_t = alpha_t x0 + sigma_t noise, with the model's own schedule in float32. A row's noise depends on
the seed, on the image and on the number of the draw alone, so that a row's activations do not depend on its batch.

Nothing in the network is replaced, so that a pass sees what the network computes: with adapters in place, under FreeU,
attention slicing, offloading, and with projections fused, where the fused result is split. Refused by name are compiled
and sharded networks, gradient checkpointing in training mode, and maps under attention that never forms them.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffcore.errors import IncompatibleModelError, NoMatchError, UserError
from diffcore.hooks import Site, capture
from diffcore.models import DiffusionModel
from diffcore.noise import row_noise
from diffusion_featsel.activation import Activation
from diffusion_featsel.attention_maps import watched_maps
from diffusion_featsel.finite import require_finite
from diffusion_featsel.fused import part_of, running_site

Condition = Mapping[str, Tensor]
Reduce = Callable[[str, Tensor], Tensor | None]


def noised(
    model: DiffusionModel, x0: Float[Tensor, "b *data"], keys: Sequence[int], t: float, *, seed: int = 0, draw: int = 0
) -> Float[Tensor, "b *data"]:
    """Returns x_t: images in the model's space with noise of one timestep.

    Args:
        model: The diffusion model, whose schedule sets the noise level.
        x0: Images in the space of the model.
        keys: One number per image that tells it from all others, such as a digest of its pixels.
        t: Timestep, in the units of the model's schedule.
        seed: Seed that all draws depend on.
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
    check_finite: bool = True,
) -> dict[str, Tensor]:
    """Runs the network on noisy inputs, and returns the activations as maps by the paper's names.

    Maps of attention to text come as one channel per token, averaged over heads. Maps of self-attention are too large
    to be features: `attention_maps` reduces them.

    Args:
        model: The diffusion model that is run.
        x_t: Noisy inputs of the network.
        t: Timestep of all inputs, in the units of the schedule.
        condition: Condition of the backbone; each tensor has one row for all inputs, or one for each.
        activations: Activations to take; `inventory` listed all of them for this size of x_t.
        reduce: Called in the hook as (name, map); its result is kept instead of the map, and None keeps nothing.
        stop: Whether the pass ends at the last activation.
        grad: Whether to keep the graph, so that gradients flow back to x_t and to the weights.
        check_finite: Whether what is returned is searched for infinity and NaN, after the pass.

    Raises:
        NoMatchError: The network did not run the module of an activation.
        IncompatibleModelError: The network is compiled, or sharded, so that its modules cannot be seen, or it is
            trained with gradient checkpointing, which runs its modules twice.
        NonFiniteError: An activation is infinite, as happens in float16, or NaN.
        UserError: An activation cannot be a feature: text without image places, or maps of self-attention.

    Example:
        >>> from diffcore.testing import tiny
        >>> from diffusion_featsel.inventory import inventory
        >>> model, (x_t, _, condition) = tiny.model("sd15"), tiny.inputs("sd15")
        >>> wanted = inventory(model).named(["up1-rep0-vit0-cross-q", "mid-vit-out"])
        >>> {name: tuple(value.shape) for name, value in activations_of(model, x_t, 50.0, condition, wanted).items()}
        {'up-level1-repeat0-vit-block0-cross-q': (2, 32, 8, 8), 'mid-vit-out': (2, 64, 4, 4)}
    """
    wanted = {activation.name: activation for activation in activations}
    _require_features(list(wanted.values()), grad=grad)
    _require_single_calls(model.backbone, grad=grad)
    # One tensor under two names is computed once, unless a reduction may treat the names differently.
    copies = {name: row.same_as for name, row in wanted.items() if row.same_as in wanted and reduce is None}
    taken = {name: row for name, row in wanted.items() if name not in copies}
    derived = [row for row in taken.values() if row.derived]
    sites, channels = _sites(model.backbone, taken)

    def kept(name: str, tensor: Tensor) -> Tensor | None:
        if taken[name].derived:
            return None
        places = taken[name].map(part_of(tensor, channels[name]))
        return places if reduce is None else reduce(name, places)

    times = torch.full((len(x_t),), float(t), device=x_t.device)
    cond = {k: v.expand(len(x_t), *v.shape[1:]) if len(v) == 1 else v for k, v in condition.items()}
    with torch.set_grad_enabled(grad), ExitStack() as stack:
        maps = stack.enter_context(watched_maps(model.backbone, derived))
        found = stack.enter_context(capture(model.backbone, sites, reduce=kept, stop=stop, grad=grad))
        model.denoiser(x_t, times, cond)
    if found.silent:
        _refuse_silent(type(model.backbone).__name__, [wanted[name] for name in wanted if name in found.silent])
    values = dict(found)
    for name, value in maps.items():
        part = value if reduce is None else reduce(name, value)
        if part is not None:
            values[name] = part
    result = {name: values[copies.get(name) or name] for name in wanted if (copies.get(name) or name) in values}
    if check_finite:
        order = sorted(result, key=lambda name: wanted[name].flops)
        require_finite({name: result[name] for name in order})
    return result


def _sites(backbone: nn.Module, taken: Mapping[str, Activation]) -> tuple[list[Site], dict[str, slice]]:
    """Returns where each tensor is while the network runs, under the activation's name, and its channels there."""
    sites: list[Site] = []
    channels: dict[str, slice] = {}
    for name, activation in taken.items():
        site, channels[name] = running_site(backbone, activation.site)
        sites.append(Site(site.module, site.at, name))
    return sites, channels


def _require_features(activations: Sequence[Activation], *, grad: bool) -> None:
    for row in activations:
        if row.kind == "self-map":
            raise UserError(
                f"{row.name} has {row.shape[-2]} x {row.shape[-1]} numbers for each of {row.shape[0]} heads; "
                "give `self_maps` a reduction for it"
            )
        if row.grid is None:
            raise UserError(f"{row.name} has no places in the image: it is text; choose another activation")
        if row.derived and grad:
            raise UserError(f"{row.name} is computed beside the network, without gradients; set `grad` to false")


def _require_single_calls(backbone: nn.Module, *, grad: bool) -> None:
    """Raises where gradient checkpointing would run modules a second time during backward."""
    checkpointed = any(vars(module).get("gradient_checkpointing", False) for module in backbone.modules())
    if checkpointed and (backbone.training or grad):
        raise IncompatibleModelError(
            f"{type(backbone).__name__} runs modules twice under gradient checkpointing "
            f"{'in training mode' if backbone.training else 'while gradients are kept'}; call its "
            f"{'eval()' if backbone.training else 'disable_gradient_checkpointing()'} first"
        )


def _refuse_silent(network: str, silent: Sequence[Activation]) -> None:
    names = ", ".join(row.name for row in silent[:4]) + (", …" if len(silent) > 4 else "")
    raise NoMatchError(
        f"{network} did not run {silent[0].site.module} in this pass, so that there is no {names}; make a new "
        "inventory of the model as it is now"
    )
