"""Benchmark cases of training and swapping, against what PEFT and diffusers do: one adapter, one U-Net at a time."""

import copy
import importlib.util
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from diffcore.bench import Case
from diffcore.denoiser import NetworkDenoiser
from diffcore.models import DiffusionModel
from diffcore.models.backbones import backbone_call
from diffcore.train import rise_and_fall
from diffcore.train.timesteps import default_time_sampler
from w2w_space.files.export import export_vector
from w2w_space.instance import Deck, denoising_errors
from w2w_space.layout import Layout
from w2w_space.population import Population, Stacked
from w2w_space.recipe import initial_vectors, layout_for
from w2w_space.space import WeightSpace
from w2w_space.styles import RECIPE, load_base, style_instances, style_labels
from w2w_space.swap import LiveAdapter
from w2w_space.train_population import train_population

_TARGETS = ("to_q", "to_v")  # the paper's
_NAME = "default"  # what PEFT calls an adapter unless told otherwise


def training_cases(*, smoke: bool = False) -> list[Case]:
    """Returns the cases; none where peft, which the references are made of, is not installed.

    Args:
        smoke: Take small sizes, for a check of agreement only.
    """
    if importlib.util.find_spec("peft") is None:
        return []
    members, steps = (3, 2) if smoke else (16, 10)
    return [
        _training(members, batch_size=4, steps=steps, goal=1.7),
        _training(members, batch_size=1, steps=steps, goal=4.0),
        _swapping(smoke=smoke),
    ]


def _training(members: int, *, batch_size: int, steps: int, goal: float) -> Case:
    """Adapters of digits in styles: all in one forward pass, against PEFT's layers one adapter after another."""
    recipe = replace(RECIPE, batch_size=batch_size, steps=steps)
    people = style_instances(style_labels(members))

    @cache
    def prepared(dtype: torch.dtype) -> tuple[DiffusionModel, NetworkDenoiser, Layout]:
        from peft import LoraConfig, inject_adapter_in_model

        model = load_base()
        torch.nn.Module.to(model.backbone, dtype)  # diffusers' own method warns of layers that this network lacks
        layout = layout_for(model, recipe.targets, recipe.rank)
        config = LoraConfig(r=recipe.rank, lora_alpha=int(recipe.alpha), target_modules=list(layout.modules))
        network: Any = inject_adapter_in_model(config, copy.deepcopy(model.backbone), _NAME)
        told = model.denoiser
        return model, NetworkDenoiser(network, told.schedule, told.prediction_type, call=backbone_call(network)), layout

    def ours(count: int = members, dtype: torch.dtype = torch.float32) -> Tensor:
        model, _, layout = prepared(dtype)
        trained = train_population(model, people[:count], recipe, layout=layout, group_size=members, num_pairs=1)
        return torch.stack([member.history for member in trained])

    def theirs(count: int = members, dtype: torch.dtype = torch.float32) -> Tensor:
        _, denoiser, layout = prepared(dtype)
        sampler, factor = (
            default_time_sampler(denoiser.schedule),
            rise_and_fall(steps, warmup=recipe.warmup, floor=recipe.floor),
        )
        start = layout.factors(initial_vectors(layout, recipe, [people[0].name])[0])
        layers: dict[str, Any] = {name: denoiser.backbone.get_submodule(name) for name in layout.modules}
        found = []
        for person in people[:count]:
            factors = []
            for name, layer in layers.items():
                with torch.no_grad():
                    layer.lora_A[_NAME].weight.copy_(start[name][0])
                    layer.lora_B[_NAME].weight.copy_(start[name][1])
                factors += [layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight]
            optimizer = torch.optim.AdamW(
                factors, recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay
            )
            deck = Deck([person], sampler, seed=recipe.seed, antithetic=False, like=torch.empty((), dtype=dtype))
            losses = []
            for step in range(steps):
                loss = denoising_errors(denoiser, deck.deal(batch_size, step)).mean()
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(factors, recipe.clip or float("inf"))
                optimizer.param_groups[0]["lr"] = recipe.learning_rate * factor(step)
                optimizer.step()
                losses.append(loss.detach())
            found.append(torch.stack(losses))
        return torch.stack(found)

    def agree(a: Tensor, b: Tensor) -> bool:
        # Adam takes steps of full size along gradients that are rounding errors, which differ: single precision agrees
        # on average, double precision in each loss of each adapter.
        exact = ours(3, torch.float64), theirs(3, torch.float64)
        return bool((exact[0] - exact[1]).abs().max() < 1e-4) and bool((a.mean() / b.mean() - 1).abs() < 0.02)

    sizes = {"adapters": members, "batch": batch_size, "steps": steps}
    return Case("train adapters of the digits base together, against PEFT one by one", sizes, ours, theirs, agree, goal)


def _swapping(*, smoke: bool) -> Case:
    """A point of a space put into a loaded U-Net, against the U-Net read anew with the point's LoRA file."""

    @cache
    def prepared() -> SimpleNamespace:
        folder = tempfile.TemporaryDirectory()
        network = _unet(tiny=smoke)
        network.save_pretrained(Path(folder.name) / "unet", safe_serialization=True)
        found = {name: tuple(m.weight.shape) for name, m in network.named_modules() if name.endswith(_TARGETS)}
        layout = Layout.of(found, rank=1)
        g = torch.Generator().manual_seed(0)
        members = 5 if smoke else 30
        matrix = torch.randn(members, layout.size, generator=g)
        space = WeightSpace.build(Population(layout, tuple(map(str, range(members))), Stacked(matrix)), gauge="raw")
        point = space.point(torch.randn(space.num_components, generator=g))
        file = export_vector(layout, point.vector, Path(folder.name) / "edited.safetensors", dtype=torch.float32).path
        network.load_lora_adapter(file, prefix="unet", adapter_name=_NAME)
        live = LiveAdapter(SimpleNamespace(unet=network), _NAME)
        return SimpleNamespace(folder=folder, live=live, point=point, file=file, modules=layout.modules)

    def ours() -> list[Tensor]:
        made = prepared()
        made.live.put(made.point)
        return _changes(made.live.network, made.modules)

    def theirs() -> list[Tensor]:
        from diffusers import UNet2DConditionModel

        made = prepared()
        network: Any = UNet2DConditionModel.from_pretrained(Path(made.folder.name) / "unet", torch_dtype=_dtype(smoke))
        network.load_lora_adapter(made.file, prefix="unet", adapter_name=_NAME)
        return _changes(network, made.modules)

    def agree(a: list[Tensor], b: list[Tensor]) -> bool:
        # Both live in the network's precision, with factors of another balance.
        return all(float((x - y).norm() / y.norm()) < 2e-2 for x, y in zip(a, b, strict=True))

    sizes = {"parameters": "tiny" if smoke else "860 million", "numbers": "few" if smoke else 99_648}
    return Case("put an edit into a loaded U-Net, against reading it anew", sizes, ours, theirs, agree, 50.0)


def _changes(network: Any, modules: tuple[str, ...]) -> list[Tensor]:
    """Returns the change of the first and the last module."""
    found = []
    for name in (modules[0], modules[-1]):
        layer = network.get_submodule(name)
        down, up = layer.lora_A[_NAME].weight.detach().float(), layer.lora_B[_NAME].weight.detach().float()
        found.append(layer.scaling[_NAME] * up @ down)
    return found


def _dtype(smoke: bool) -> torch.dtype:
    return torch.float32 if smoke else torch.float16


def _unet(*, tiny: bool) -> Any:
    """Returns a U-Net in the shapes of Stable Diffusion 1.5, whose numbers are arbitrary, or a small one."""
    from diffusers import UNet2DConditionModel

    small = {
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": 32,
    }
    config: dict[str, Any] = small if tiny else {"cross_attention_dim": 768}
    with torch.device("meta"):
        network: Any = UNet2DConditionModel(**config)
    torch.nn.Module.to(
        network, _dtype(tiny)
    )  # diffusers' own warns of layers that stay in float32, of which it has none
    network = network.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(0.01)  # reading them takes as long as that of trained ones
    return network.eval()
