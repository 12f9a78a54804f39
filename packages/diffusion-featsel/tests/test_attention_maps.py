"""Attention maps: probabilities that give the module's output, equal to the library's own, and reduced."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from diffcore.errors import IncompatibleModelError, UserError
from diffcore.models import DiffusionModel
from diffcore.testing import tiny
from diffusion_featsel.attention_maps import self_maps, up_cross
from diffusion_featsel.forward import activations_of
from diffusion_featsel.inventory import Inventory, inventory

T = 50.0


def setting(name: str = "sd15") -> tuple[DiffusionModel, Tensor, dict[str, Tensor], Inventory]:
    model, (x_t, _, cond) = tiny.model(name), tiny.inputs(name)
    return model, x_t, cond, listed(name)


@cache
def listed(name: str) -> Inventory:
    return inventory(tiny.backbone(name), size=(8, 8), num_text=7)


def probabilities(module: Any, query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
    """Returns the library's own map of a module from tokens of queries and keys."""
    scores = module.get_attention_scores(module.head_to_batch_dim(query), module.head_to_batch_dim(key), mask)
    return scores.unflatten(0, (len(query), module.heads))


def tokens(value: Tensor) -> Tensor:
    return value.flatten(2).mT


@pytest.mark.parametrize("name", ["sd15", "sdxl", "pixart"])
def test_maps_give_what_the_module_returned(name: str) -> None:
    model, x_t, cond, found = setting(name)
    whole: dict[str, list[Tensor]] = {}

    def keep(name: str, probs: Tensor) -> Tensor:
        whole.setdefault(name, []).append(probs)
        return probs.mean(1)

    rows = [row for row in found if row.kind == "self-map"]
    self_maps(model, x_t, T, cond, rows, reduce=keep, chunk_megabytes=1)
    taken = activations_of(model, x_t, T, cond, found.features)
    for row in rows:
        stem = row.name.removesuffix("self-map")
        module: Any = model.backbone.get_submodule(row.site.module)
        probs = torch.cat(whole[row.name], 2)
        assert probs.shape == (2, *row.shape)
        torch.testing.assert_close(probs.sum(-1), torch.ones(probs.shape[:-1]), rtol=0, atol=1e-6)
        query, key, value = (tokens(taken[f"{stem}self-{kind}"]) for kind in "qkv")
        torch.testing.assert_close(probs, probabilities(module, query, key), rtol=0, atol=1e-6)
        mixed = probs @ value.unflatten(2, (module.heads, -1)).transpose(1, 2)
        out = module.to_out[0](mixed.transpose(1, 2).flatten(2))
        torch.testing.assert_close(out, tokens(taken[f"{stem}self-out"]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_maps_of_text_are_those_of_the_library(masked: bool) -> None:
    model, x_t, cond, found = setting("pixart")
    mask = cond["encoder_attention_mask"] if masked else torch.ones(2, 7)
    cond = cond | {"encoder_attention_mask": mask}
    states: Any = model.backbone
    projected = states.caption_projection(cond["encoder_hidden_states"])
    rows = [row for row in found if row.kind == "cross-map"]
    taken = activations_of(model, x_t, T, cond, [*rows, *(row for row in found if row.kind == "cross-q")])
    for row in rows:
        module: Any = model.backbone.get_submodule(row.site.module)
        query = tokens(taken[row.name.replace("map", "q")])
        bias = ((1 - mask) * -10000.0)[:, None].repeat_interleave(module.heads, 0)
        expected = probabilities(module, query, module.to_k(projected), bias).mean(1)
        torch.testing.assert_close(tokens(taken[row.name]), expected, rtol=0, atol=1e-6)
        assert bool((taken[row.name][:, 4:] < 1e-6).all()) is masked


def test_other_attention_is_refused_with_the_remedy() -> None:
    model, x_t, cond, found = setting()
    backbone: Any = model.backbone
    backbone.set_attn_processor(AttnProcessor())
    with pytest.raises(IncompatibleModelError, match="set_processor"):
        activations_of(model, x_t, T, cond, found.named(["mid-vit0-cross-map"]))


def test_features_do_not_depend_on_the_attention_code() -> None:
    model, x_t, cond, found = setting()
    fused = activations_of(model, x_t, T, cond, found.features)
    backbone: Any = model.backbone
    backbone.set_attn_processor(AttnProcessor())
    written_out = activations_of(model, x_t, T, cond, found.features)
    for name, value in fused.items():
        torch.testing.assert_close(value, written_out[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_joint_maps_show_text_to_each_place(name: str) -> None:
    model, x_t, cond, found = setting(name)
    rows = [row for row in found if row.kind == "map"]
    taken = activations_of(model, x_t, T, cond, rows)
    for row in rows:
        assert taken[row.name].shape == (2, 7, *(row.grid or ()))
        share = taken[row.name].sum(1)
        assert bool(((share > 0) & (share < 1)).all())
    with pytest.raises(UserError, match="attend jointly"):
        self_maps(model, x_t, T, cond, rows, reduce=lambda name, probs: probs.mean(1))


def test_the_pass_ends_at_the_last_map() -> None:
    model, x_t, cond, found = setting()
    ran: list[str] = []
    model.backbone.get_submodule("up_blocks.1").register_forward_hook(lambda *_: ran.append("later"))
    row = found["mid-vit0-cross-map"]
    early = activations_of(model, x_t, T, cond, [row, found["mid-vit0-cross-q"]])
    self_maps(model, x_t, T, cond, found.named(["mid-vit0-self-map"]), reduce=lambda name, probs: probs.mean(1))
    assert ran == []
    assert torch.equal(early[row.name], activations_of(model, x_t, T, cond, [row], stop=False)[row.name])
    assert ran == ["later"]


def test_features_of_one_layer_only_are_self_maps() -> None:
    model, x_t, cond, found = setting()
    with pytest.raises(UserError, match="no map of one attention layer"):
        self_maps(model, x_t, T, cond, found.named(["mid-vit-out"]), reduce=lambda name, probs: probs.mean(1))


def test_up_cross_is_the_mean_of_layers_of_a_size_beside_other_sizes(model_of: Callable[..., DiffusionModel]) -> None:
    backbone = tiny.backbone(
        "sd15",
        layers_per_block=1,
        block_out_channels=(16, 16),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
    )
    model, (_, _, cond) = model_of("sd15", backbone), tiny.inputs("sd15", batch=1)
    x_t = torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    found = inventory(backbone, size=(64, 64), num_text=7)
    row = found["up-cross-map"]
    assert (row.channels, row.grid, len(row.modules), row.paper) == (14, (64, 64), 4, False)
    layers = found.match("up-level*-cross-map")
    taken = activations_of(model, x_t, T, cond, [row, *layers])
    coarse, fine = ([taken[each.name] for each in layers if each.level == level] for level in (0, 1))
    expected = torch.cat(
        [torch.stack(coarse).mean(0).repeat_interleave(2, 2).repeat_interleave(2, 3), torch.stack(fine).mean(0)], 1
    )
    assert torch.equal(taken["up-cross-map"], expected)
    assert row.cost == layers[-1].cost


def test_small_maps_make_no_attention_feature() -> None:
    assert "up-cross-map" not in inventory(tiny.backbone("sd15"))
    assert up_cross([torch.rand(1, 3, 2, 2)]).shape == (1, 3, 2, 2)


def test_module_of_a_map_is_an_attention_layer() -> None:
    for name in tiny.NAMES:
        backbone: nn.Module = tiny.backbone(name)
        for row in inventory(backbone):
            if row.derived:
                assert hasattr(backbone.get_submodule(row.site.module), "to_q")
