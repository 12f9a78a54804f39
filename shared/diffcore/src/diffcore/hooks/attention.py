"""Attention maps P = softmax(scale q kᵀ + mask), which fused attention kernels never form.

Networks call `torch.nn.functional.scaled_dot_product_attention` once per attention module. A torch function mode
intercepts that function, and hooks on the modules tell which of them calls it. So q and k are final (after norms,
rotation, fused projections, adapters), masks are known, and nothing in the network is replaced.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from diffcore.errors import IncompatibleModelError
from diffcore.hooks.attach import in_backward, put_on, require_hookable, this_thread
from diffcore.hooks.capture import Activations
from diffcore.hooks.layout import Layout, layout, network_call
from diffcore.hooks.match import find
from diffcore.hooks.scores import AttentionCall

NamedReduction = Literal["mean_heads", "per_token", "entropy", "sum_over_time"]
Reduction = NamedReduction | Callable[[str, Tensor], Tensor]


@contextmanager
def attention_probs(
    model: nn.Module,
    patterns: str | Sequence[str],
    *,
    reduce: Reduction | Sequence[Reduction] | None = None,
    check: bool = False,
    chunk_megabytes: int = 256,
) -> Iterator[Activations]:
    """Computes attention maps while the block runs.

    ``with attention_probs(unet, "*.attn2") as maps: unet(x, t, states)``

    A full map is `b heads queries keys`; one of 8 heads and 4096 x 4096 takes 512 MiB per row. So `reduce` may be

    * "mean_heads": the mean over heads, `b queries keys`;
    * "per_token": one image per token, mean over heads, `b tokens height width`; where image and text attend jointly
      (SD3, Flux), the text tokens as the image sees them;
    * "entropy": of each query's distribution, in nats, `b heads queries`;
    * "sum_over_time": the sum over all forward passes of the block, of full maps or, as in
      ``("per_token", "sum_over_time")``, of another reduction;
    * a function, called as (name, map of some of the queries), that returns `b queries ...`.

    Maps are float32 (float64 in float64 networks), detached, and without dropout. Sequences that image and text share
    are in the order of the network: image first in SD3, text first in Flux.

    Args:
        model: The network that runs in the block.
        patterns: Names of modules as in `match`; the attention modules among the matches are taken.
        reduce: The reduction, or several, listed above; None keeps full maps.
        check: Whether P v is compared with the result of the fused kernel; a difference raises.
        chunk_megabytes: Largest part of a map, in MiB (2^20 bytes), that exists at once before it is reduced.

    Raises:
        NoMatchError: A pattern matches no attention module.
        IncompatibleModelError: The network is compiled or replicated; a module attends by other means; the check fails.
        ValueError: `reduce` is unknown, or "per_token" cannot tell height and width.
    """
    keep, is_summed = _reductions(reduce)
    modules = find(model, patterns, _is_attention, "attention module")
    require_hookable(model)
    maps = Activations(modules)

    def keep_map(name: str, call: AttentionCall, read_layout: Callable[[int], Layout]) -> None:
        value = _reduced(name, call, keep, read_layout, chunk_megabytes * 2**20)
        maps.silent.discard(name)
        if is_summed:
            maps[name] = maps[name] + value if name in maps else value
        else:
            maps.add(name, value)

    watch = _Watch(keep_map, check=check)
    with ExitStack() as stack:
        stack.callback(put_on(model, partial(watch.enter_network), before=True).remove)
        for name, module in modules.items():
            stack.callback(put_on(module, partial(watch.enter, name), before=True).remove)
            stack.callback(put_on(module, partial(watch.leave, name), before=False).remove)
        stack.enter_context(watch)
        yield maps


class _Watch(TorchFunctionMode):
    """Hands the fused attention call of each module to `keep`, as (name, call, how to read its sequences)."""

    def __init__(self, keep: Callable[[str, AttentionCall, Callable[[int], Layout]], None], *, check: bool) -> None:
        super().__init__()
        self.keep = keep
        self.check = check
        self.is_mine = this_thread()
        self.network: tuple[Any, Any] = ((), {})
        self.running: tuple[str, Callable[[int], Layout]] | None = None
        self.num_calls = 0

    def enter_network(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        del model
        if self.is_mine():
            self.network = (args, kwargs)

    def enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.is_mine() and not in_backward():
            self.running = (name, lambda count: layout(network_call(*self.network), module, args, kwargs, count))
            self.num_calls = 0

    def leave(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        del args, output
        if self.is_mine() and not in_backward():
            self.running = None
            if self.num_calls != 1:
                raise IncompatibleModelError(_explain_calls(name, module, self.num_calls))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is functional.scaled_dot_product_attention and self.running is not None:
            self.num_calls += 1
            if self.num_calls == 1:
                self._see(*self.running, AttentionCall(*args, **kwargs), output)
        return output

    @torch.no_grad()
    def _see(self, name: str, read_layout: Callable[[int], Layout], call: AttentionCall, output: Tensor) -> None:
        self.keep(name, call, read_layout)
        if self.check and not call.dropout_p:
            _require_equal(name, call, output)


def _is_attention(module: nn.Module) -> bool:
    return hasattr(module, "to_q") or hasattr(module, "q_proj")


def _reductions(reduce: Reduction | Sequence[Reduction] | None) -> tuple[Reduction | None, bool]:
    """Returns the reduction of one map, and whether maps are summed over forward passes."""
    wanted: list[Any] = [reduce] if reduce is None or isinstance(reduce, str) or callable(reduce) else list(reduce)
    for one in wanted:
        if one is not None and not callable(one) and one not in get_args(NamedReduction):
            raise ValueError(f"`reduce` is {one!r}; it may be {', '.join(get_args(NamedReduction))} or a function")
    is_summed = wanted[-1:] == ["sum_over_time"]
    kept = wanted[:-1] if is_summed else wanted
    if len(kept) > 1 or "sum_over_time" in kept:
        raise ValueError("reduce may be one reduction, and 'sum_over_time' after it")
    return (kept[0] if kept else None), is_summed


def _reduced(
    name: str, call: AttentionCall, keep: Reduction | None, read_layout: Callable[[int], Layout], most_bytes: int
) -> Tensor:
    queries, tokens = range(call.num_queries), slice(None)
    grid = None
    if keep == "per_token":
        reading = read_layout(call.num_queries)
        queries, tokens, grid = reading.places, reading.tokens, reading.grid
    parts: list[Tensor] = []
    for chunk in call.chunks(queries, most_bytes):
        probs = call.probs(chunk)
        if keep is None:
            parts.append(probs)
        elif keep == "mean_heads":
            parts.append(probs.mean(-3))
        elif keep == "per_token":
            parts.append(probs[..., tokens].mean(-3).mT)
        elif keep == "entropy":
            parts.append(torch.special.entr(probs).sum(-1))
        elif callable(keep):
            parts.append(_checked(name, keep(name, probs), len(chunk)))
    axis = 1 if callable(keep) or keep == "mean_heads" else 2
    joined = parts[0] if len(parts) == 1 else torch.cat(parts, axis)
    return joined if grid is None else joined.unflatten(-1, grid)


def _checked(name: str, result: Tensor, num_queries: int) -> Tensor:
    if result.ndim < 2 or result.shape[1] != num_queries:
        raise ValueError(
            f"reduce returned shape {tuple(result.shape)} for {num_queries} queries of {name!r}; they come second"
        )
    return result


def _require_equal(name: str, call: AttentionCall, output: Tensor) -> None:
    tolerance = max(1e-5, 4 * torch.finfo(output.dtype).eps) * max(1.0, float(output.abs().max()))
    errors = [call.error(chunk, output) for chunk in call.chunks(range(call.num_queries), 2**28)]
    if not float(torch.stack(errors).max()) <= tolerance:
        raise IncompatibleModelError(
            f"the attention map of {name!r} times its values differs by {float(max(errors)):.2g} from what the fused "
            f"kernel returned, more than {tolerance:.2g}; choose another attention backend"
        )


def _explain_calls(name: str, module: nn.Module, num_calls: int) -> str:
    processor = getattr(module, "processor", None)
    backend = getattr(processor, "_attention_backend", None)
    if num_calls:
        return f"{name!r} attends {num_calls} times ({type(processor).__name__}), so it has no single map"
    if backend is not None:
        how, remedy = f"attention backend {getattr(backend, 'value', backend)}", 'model.set_attention_backend("native")'
    elif hasattr(type(processor), "_attention_backend"):
        how, remedy = "another attention backend", 'model.set_attention_backend("native")'
    else:
        how, remedy = type(processor).__name__, "its set_processor(AttnProcessor2_0())"
    return f"{name!r} uses {how}; call {remedy} first"
