"""A denoiser that learns as a LoRA, on weights that it shares with the denoiser it starts from.

A weight W of the base becomes W + alpha / rank B A, of which A and B alone learn. Each `LoraDenoiser` has modules of
its own around the base's tensors: several of them take the memory of one network and small adapters, the base runs
without an adapter as it always did, and nothing need be switched between calls.
"""

import copy
import re
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Num
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from diffcore.adapters import Adapter, fuse
from diffcore.denoiser import Condition, Denoiser, NetworkDenoiser, Prediction
from diffcore.errors import UserError

_NAME = "default"  # of the adapter inside PEFT


class LoraDenoiser(Denoiser):
    """A denoiser with another's weights, shared and constant, and a LoRA of PEFT that learns.

    It starts as the other exactly, since B is zero. Copies (`copy.deepcopy`) share the weights too, and `state_dict`
    holds the LoRA alone, so that averages and checkpoints are as small as it is. The shared weights cease to learn
    where they did.

    Args:
        base: Denoiser whose weights are shared.
        rank: Rank of the change of each weight.
        alpha: Strength of the change in units of the rank; by default the rank, where all tools agree.
        targets: Ends of names of the linear and convolutional modules to change, such as "to_q"; by default all.
        seed: Seed of the weights A.

    Raises:
        ValueError: The rank is below 1, or no module has such a name.
        UserError: The base carries a LoRA of PEFT already.

    Example:
        >>> from diffcore.testing import tiny
        >>> base = tiny.denoiser("unet2d")
        >>> lora = LoraDenoiser(base, rank=4, targets=["to_q", "to_v"])
        >>> sum(p.numel() for p in lora.parameters() if p.requires_grad) < sum(p.numel() for p in base.parameters())
        True
        >>> next(lora.base_parameters()) is next(base.parameters())
        True
    """

    def __init__(
        self,
        base: NetworkDenoiser,
        rank: int,
        *,
        alpha: float | None = None,
        targets: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"`rank` is {rank}; give at least 1")
        if any(isinstance(module, LoraLayer) for module in base.modules()):
            raise UserError("the network carries a LoRA of PEFT already; fuse or unload it first")
        names = [name for name, module in base.backbone.named_modules() if _changeable(module)]
        chosen = [n for n in names if targets is None or any(f".{n}".endswith(f".{end}") for end in targets)]
        if not chosen:
            raise ValueError(f"`targets` are {targets}, and no linear or convolutional module is called so")
        self.schedule = base.schedule
        self.rank, self.alpha, self.targets = rank, float(rank if alpha is None else alpha), targets
        self._base: tuple[NetworkDenoiser] = (base,)  # in a tuple, it is no part of this module
        self.network: NetworkDenoiser = copy.deepcopy(base, {id(p): p for p in base.parameters()})
        config = LoraConfig(r=rank, lora_alpha=self.alpha, target_modules="|".join(map(re.escape, chosen)))  # pyright: ignore
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, self.network.backbone, _NAME)
        shared = {id(p) for p in base.parameters()}
        self._own = frozenset(name for name, part in self.named_parameters() if id(part) not in shared)
        for name, part in self.named_parameters():
            if name in self._own:  # learned in float32, whatever the base's precision
                part.data = part.data.float()
                part.requires_grad_(True)

    def forward(self, x_t: Float[Tensor, "b *data"], t: Num[Tensor, " b"], cond: Condition | None = None) -> Prediction:
        """Calls the network with its LoRA once."""
        return self.network(x_t, t, cond)

    @property
    def base(self) -> NetworkDenoiser:
        """The denoiser that the weights are shared with."""
        return self._base[0]

    def base_parameters(self) -> Any:
        """Yields the weights that are shared with the base, which do not learn."""
        return (part for name, part in self.named_parameters() if name not in self._own)

    @property
    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The factors (A, B) of each changed weight by module name, B without the sides of a kernel."""
        found = {}
        for name, module in self.network.backbone.named_modules():
            if isinstance(module, LoraLayer):
                pair: list[Any] = [part[_NAME] for part in (module.lora_A, module.lora_B)]
                down, up = (part.weight.detach() for part in pair)
                found[name] = (down, up.flatten(1))
        return found

    def adapter(self, backbone: str = "unet", name: str = "adapter") -> Adapter:
        """Returns the LoRA as a value that `diffcore.adapters.write_adapter` writes.

        Args:
            backbone: Name of the network in its pipeline, "unet" or "transformer".
            name: Name of the adapter in messages.
        """
        return Adapter.from_factors(self.factors, alpha=self.alpha, backbone=backbone, name=name)  # pyright: ignore[reportArgumentType]

    def merged(self) -> NetworkDenoiser:
        """Returns a denoiser whose changed weights are the sums; it shares the others with the base."""
        plain = self.base
        network = fuse(plain.backbone, self.adapter().modules)
        return NetworkDenoiser(
            network, plain.schedule, plain.prediction_type, sigma_data=plain.sigma_data, call=plain.call
        ).eval()

    def state_dict(self, *args: Any, prefix: str = "", **options: Any) -> Any:
        """Returns the tensors of the LoRA alone."""
        found = super().state_dict(*args, prefix=prefix, **options)
        for name in [name for name in found if name.startswith(prefix) and name[len(prefix) :] not in self._own]:
            del found[name]
        return found

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **options: Any) -> None:
        own = super().state_dict(prefix=prefix)  # the shared weights are where they belong already
        state_dict.update({name: part for name, part in own.items() if name[len(prefix) :] not in self._own})
        super()._load_from_state_dict(state_dict, prefix, *args, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> "LoraDenoiser":
        memo.update({id(part): part for part in (*self.base_parameters(), self.base)})
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        vars(made).update(copy.deepcopy(vars(self), memo))
        return made


def _changeable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
