"""One forward pass: early exit, what activations are made of, and what is in the way of hooks in real models."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, cast

import accelerate
import pytest
import torch
from diffusers import ControlNetModel
from diffusers.models.attention_processor import FusedAttnProcessor2_0
from peft import LoraConfig
from torch import Tensor, nn

from diffcore.errors import IncompatibleModelError, NoMatchError, UserError
from diffcore.hooks import Site, capture
from diffcore.models import DiffusionModel
from diffcore.testing import tiny
from diffusion_featsel.activation import Activation
from diffusion_featsel.conditions import with_controlnet
from diffusion_featsel.finite import NonFiniteError, require_finite
from diffusion_featsel.forward import activations_of
from diffusion_featsel.inventory import Inventory, inventory

ModelOf = Callable[..., DiffusionModel]
SD_SHAPED = {
    "sample_size": 16,
    "block_out_channels": (16, 16, 32, 32),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "attention_head_dim": 2,
}
T = 50.0


def setting(name: str) -> tuple[DiffusionModel, Tensor, dict[str, Tensor], Inventory]:
    model, (x_t, _, cond) = tiny.model(name), tiny.inputs(name)
    return model, x_t, cond, listed(name)


@cache
def listed(name: str) -> Inventory:
    return inventory(tiny.backbone(name), size=(8, 8), num_text=7)


def features(
    model: DiffusionModel, x_t: Tensor, cond: dict[str, Tensor], found: Inventory, **options: Any
) -> dict[str, Tensor]:
    return activations_of(model, x_t, T, cond, found.features, **options)


def require_equal(left: dict[str, Tensor], right: dict[str, Tensor], atol: float = 0.0) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def num_hooks(network: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules())


def test_early_exit_has_the_bits_of_the_whole_pass(model_of: ModelOf) -> None:
    backbone = tiny.backbone("sd15", **SD_SHAPED)
    model, found = model_of("sd15", backbone), inventory(backbone)
    wanted = [row for row in found.paper if not row.derived]
    assert len(wanted) == 165
    _, _, cond = tiny.inputs("sd15", batch=1)
    x_t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = activations_of(model, x_t, T, cond, wanted, stop=False)
    assert list(whole) == [row.name for row in wanted]
    for row in wanted:
        early = activations_of(model, x_t, T, cond, [row])
        assert torch.equal(early[row.name], whole[row.name]), row.name


@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_feature_of_every_class_is_a_map_of_the_listed_size(name: str) -> None:
    model, x_t, cond, found = setting(name)
    taken = features(model, x_t, cond, found)
    assert {key: tuple(value.shape) for key, value in taken.items()} == {
        row.name: (2, row.channels, *(row.grid or ())) for row in found.features
    }


def test_the_pass_ends_at_the_last_activation() -> None:
    model, x_t, cond, found = setting("sd15")
    ran: list[str] = []
    model.backbone.get_submodule("up_blocks.0.resnets.1").register_forward_hook(lambda *_: ran.append("later"))
    activations_of(model, x_t, T, cond, found.named(["up0-rep0-res-out", "down0-rep0-res-out"]))
    assert ran == []
    activations_of(model, x_t, T, cond, found.named(["up0-rep0-res-out"]), stop=False)
    assert ran == ["later"]


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_outputs_are_sums_of_what_went_in_and_increments(name: str) -> None:
    model, x_t, cond, found = setting(name)
    taken = features(model, x_t, cond, found)
    for row in found:
        if row.kind == "res-in":
            module: Any = model.backbone.get_submodule(row.site.module)
            shortcut = module.conv_shortcut or nn.Identity()
            stem = row.name.removesuffix("res-in")
            assert torch.equal(shortcut(taken[row.name]) + taken[f"{stem}res-increment"], taken[f"{stem}res-out"])
        if row.kind == "vit-out":
            module = model.backbone.get_submodule(row.site.module)
            stem = row.name.removesuffix("vit-out")
            last = taken[f"{stem}vit-block{len(module.transformer_blocks) - 1}-out"]
            before = "mid-repeat0-" if row.stage == "mid" else stem
            tokens = last.flatten(2).mT
            out = module.proj_out(tokens).mT.unflatten(2, last.shape[2:]) if name == "sdxl" else module.proj_out(last)
            torch.testing.assert_close(out + taken[f"{before}res-out"], taken[row.name], rtol=0, atol=1e-6)


def test_attention_projections_are_recomputed_from_the_modulated_input() -> None:
    for name in ("sd15", "dit", "pixart"):
        model, x_t, cond, found = setting(name)
        taken = features(model, x_t, cond, found)
        for row in (row for row in found if row.kind == "norm-out"):
            block = row.name.removesuffix("norm-out")
            for kind in "qkv":
                layer = model.backbone.get_submodule(found[f"{block}self-{kind}"].site.module)
                again = layer(taken[row.name].flatten(2).mT).mT.unflatten(2, row.grid or ())
                torch.testing.assert_close(again, taken[f"{block}self-{kind}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "block", "norm", "same"),
    [
        ("sd15", "mid-vit-block0", "mid_block.attentions.0.transformer_blocks.0.norm1", True),
        ("dit", "vit-block0", "transformer_blocks.0.norm1", True),
        ("sd3", "vit-block1", "transformer_blocks.1.norm1", True),
        ("flux", "vit-block0", "transformer_blocks.0.norm1", True),
        ("flux", "vit-block1", "single_transformer_blocks.0.norm", True),
        ("pixart", "vit-block0", "transformer_blocks.0.norm1", False),
    ],
)
def test_norm_out_is_the_modulated_tensor(name: str, block: str, norm: str, same: bool) -> None:
    model, x_t, cond, found = setting(name)
    row = found[f"{block}-norm-out"]
    taken = activations_of(model, x_t, T, cond, [row])[row.name]
    with capture(model.backbone, norm) as seen:
        model.denoiser(x_t, torch.full((2,), T), cond)
    assert torch.equal(taken, row.map(seen[norm])) is same


def test_text_is_cut_whatever_its_length() -> None:
    model, x_t, cond, _ = setting("flux")
    found = inventory(model, size=(8, 8), num_text=512)
    for row in found.named(["vit-block1-q", "vit-block1-ffn-inner", "vit-block1-out"]):
        taken = activations_of(model, x_t, T, cond, [row])[row.name]
        with capture(model.backbone, row.site) as seen:
            model.denoiser(x_t, torch.full((2,), T), cond)
        whole = seen[row.site.key]
        assert torch.equal(taken.flatten(2).mT, whole[:, whole.shape[1] - 16 :])


def test_other_names_are_the_same_tensor() -> None:
    model, x_t, cond, found = setting("sd15")
    taken = activations_of(
        model, x_t, T, cond, found.named(["skip0", "skip2", "unet-after-conv-in", "down0-downsampler"])
    )
    assert taken["skip0"] is taken["unet-after-conv-in"]
    assert taken["skip2"] is taken["down-level0-downsampler-out"]
    alone = activations_of(model, x_t, T, cond, found.named(["skip1"]))["skip1"]
    assert torch.equal(alone, features(model, x_t, cond, found)[found["skip1"].same_as or ""])


def test_reductions_see_maps_and_may_keep_nothing() -> None:
    model, x_t, cond, found = setting("sdxl")
    seen: dict[str, tuple[int, ...]] = {}

    def reduce(name: str, value: Tensor) -> Tensor | None:
        seen[name] = tuple(value.shape)
        return value.mean((2, 3)) if name == "mid-vit-out" else None

    rows = found.named(["mid-vit-out", "up0-rep0-vit0-cross-q", "up0-rep0-vit0-cross-map"])
    kept = activations_of(model, x_t, T, cond, rows, reduce=reduce)
    assert seen == {row.name: (2, row.channels, *(row.grid or ())) for row in rows}
    assert list(kept) == ["mid-vit-out"]
    whole = activations_of(model, x_t, T, cond, rows)
    assert torch.equal(kept["mid-vit-out"], whole["mid-vit-out"].mean((2, 3)))


def test_gradients_on_request() -> None:
    model, x_t, cond, found = setting("sd15")
    x_t.requires_grad_()
    name = "up-level1-repeat0-vit-block0-cross-q"
    plain = activations_of(model, x_t, T, cond, [found[name]])[name]
    assert not plain.requires_grad
    taken = activations_of(model, x_t, T, cond, [found[name]], grad=True)[name]
    taken.square().sum().backward()
    step = torch.zeros_like(x_t)
    step[0, 1, 2, 3] = 1e-2
    with torch.no_grad():
        up, down = (activations_of(model, x_t + sign * step, T, cond, [found[name]])[name] for sign in (1, -1))
    slope = (up.square().sum() - down.square().sum()) / 2e-2
    assert float(x_t.grad[0, 1, 2, 3]) == pytest.approx(float(slope), rel=1e-2)  # pyright: ignore[reportOptionalSubscript]


# --- hooks and errors


def test_no_hook_is_left_after_passes_and_exceptions() -> None:
    model, x_t, cond, found = setting("sd15")
    before = num_hooks(model.backbone)
    expected = model.denoiser(x_t, torch.full((2,), T), cond).output

    def fail(name: str, value: Tensor) -> Tensor:
        raise RuntimeError(name)

    rows = [*found.features, found["up1-rep0-vit0-cross-map"]]
    activations_of(model, x_t, T, cond, rows)
    with pytest.raises(RuntimeError, match="unet-in"):
        activations_of(model, x_t, T, cond, rows, reduce=fail)
    assert num_hooks(model.backbone) == before
    assert torch.equal(model.denoiser(x_t, torch.full((2,), T), cond).output, expected)


def test_a_name_that_never_ran_is_an_error(model_of: ModelOf) -> None:
    backbone = tiny.backbone("sd15")
    backbone.spare = nn.Linear(2, 2)
    model, (x_t, _, cond) = model_of("sd15", backbone), tiny.inputs("sd15")
    spare = Activation("spare", Site("spare"), "spare", "mid", shape=(2, 8, 8), channels=2, grid=(8, 8))
    rows = [spare, inventory(backbone)["mid-vit-out"]]
    for reduce in (None, lambda name, value: None):
        with pytest.raises(NoMatchError, match="did not run spare"):
            activations_of(model, x_t, T, cond, rows, reduce=reduce)


def test_what_is_no_feature_is_refused_with_its_reason() -> None:
    model, x_t, cond, found = setting("sd15")
    for name, message in (
        ("up1-rep0-vit0-self-map", "64 x 64 numbers .* `self_maps`"),
        ("mid-vit0-cross-k", "is text"),
    ):
        with pytest.raises(UserError, match=message):
            activations_of(model, x_t, T, cond, found.named([name]))
    with pytest.raises(UserError, match="without gradients"):
        activations_of(model, x_t, T, cond, found.named(["mid-vit0-cross-map"]), grad=True)


def test_inputs_of_another_size_are_refused() -> None:
    model, _, cond, found = setting("sd15")
    for name in ("mid-vit-out", "mid-vit0-self-q"):
        with pytest.raises(ValueError, match="in the inventory"):
            activations_of(model, torch.zeros(2, 4, 16, 16), T, cond, found.named([name]))


def test_overflow_names_the_first_activation_and_rows(model_of: ModelOf) -> None:
    model, x_t, cond, found = setting("sd15")
    large = x_t.clone()
    large[1] = torch.inf
    with pytest.raises(
        NonFiniteError, match=r"^unet-in is infinite in row 1 \(precision float32\), and so are"
    ) as caught:
        features(model, large, cond, found)
    assert caught.value.rows == (1,)
    assert {"unet-in", "mid-vit-out", "unet-out"} <= set(caught.value.names)
    unchecked = activations_of(model, large, T, cond, found.named(["unet-in"]), check_finite=False)
    assert unchecked["unet-in"].isinf().any()


def test_overflow_of_half_precision_suggests_bfloat16(model_of: ModelOf) -> None:
    backbone = tiny.backbone("sd15").half()
    backbone.get_parameter("mid_block.resnets.0.conv2.weight").mul_(6e4)
    model, (x_t, _, cond) = model_of("sd15", backbone), tiny.inputs("sd15")
    rows = inventory(backbone).features
    with pytest.raises(NonFiniteError, match=r"^mid-repeat0-res-increment is infinite .*bfloat16") as caught:
        activations_of(model, x_t, T, cond, rows)
    assert "down-level0-repeat0-res-out" not in caught.value.names


def test_nan_is_told_from_infinity() -> None:
    with pytest.raises(NonFiniteError, match=r"b is not a number \(NaN\) in rows 0, 2"):
        require_finite({"a": torch.ones(3, 2), "b": torch.tensor([[torch.nan], [0.0], [torch.nan]])})
    with pytest.raises(NonFiniteError, match="b is infinite"):
        require_finite({"a": torch.ones(3, 2), "b": torch.tensor(torch.inf), "c": torch.ones(2, dtype=torch.int64)})
    require_finite({"a": torch.ones(3, 2), "b": torch.tensor(1.0)})


# --- what real models do to their modules


@pytest.mark.parametrize("name", ["sd15", "sdxl", "pixart", "sd3", "flux"])
def test_fused_projections_give_the_same_features(name: str, model_of: ModelOf) -> None:
    # The library's fused processor of SD3 leaves out norms of queries and keys, and fails with a second attention.
    changes: dict[str, Any] = {"dual_attention_layers": (), "qk_norm": None} if name == "sd3" else {}
    backbone = tiny.backbone(name, **changes)
    model, (x_t, _, cond) = model_of(name, backbone), tiny.inputs(name)
    found = inventory(model, size=(8, 8), num_text=7)
    expected = features(model, x_t, cond, found)
    backbone.fuse_qkv_projections()
    require_equal(features(model, x_t, cond, found), expected, atol=2e-5)
    fused = inventory(model, size=(8, 8), num_text=7)
    assert {row.name: (row.site, row.shape) for row in fused} == {row.name: (row.site, row.shape) for row in found}
    early = found.match("*-k")[:1]
    assert torch.equal(
        activations_of(model, x_t, T, cond, early)[early[0].name], features(model, x_t, cond, found)[early[0].name]
    )
    backbone.unfuse_qkv_projections()
    require_equal(features(model, x_t, cond, found), expected)


def test_attention_without_blocks_may_be_fused() -> None:
    model, x_t, cond, found = setting("unet2d")
    expected = features(model, x_t, cond, found)
    for module in model.backbone.modules():
        if hasattr(module, "to_q"):
            fused: Any = module
            fused.fuse_projections()
            fused.set_processor(FusedAttnProcessor2_0())
    require_equal(features(model, x_t, cond, found), expected, atol=2e-5)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_free_u_is_seen_and_changes_no_taken_tensor(name: str) -> None:
    model, x_t, cond, found = setting(name)
    plain = features(model, x_t, cond, found)
    backbone: Any = model.backbone
    backbone.enable_freeu(s1=0.6, s2=0.4, b1=1.4, b2=1.6)
    seen: dict[str, Tensor] = {}

    def keep(name: str, out: Any) -> None:
        seen[name] = (out if isinstance(out, Tensor) else out[0]).clone()

    handles = [
        backbone.get_submodule(row.site.module).register_forward_hook(
            lambda module, args, out, name=row.name: keep(name, out)
        )
        for row in found.features
        if row.kind in ("res-out", "vit-out", "upsampler-out")
    ]
    model.denoiser(x_t, torch.full((2,), T), cond)
    for handle in handles:
        handle.remove()
    taken = features(model, x_t, cond, found)
    require_equal({key: taken[key] for key in seen}, seen)
    # The block after the middle scales its input in place, which is what the middle returned.
    assert torch.equal(taken["mid-repeat1-res-out"], plain["mid-repeat1-res-out"])
    assert not torch.equal(taken["up-level0-repeat0-res-in"], plain["up-level0-repeat0-res-in"])
    assert [row.name for row in inventory(backbone)] == [row.name for row in listed(name)]


def test_sliced_attention_gives_the_same_features_and_no_maps() -> None:
    model, x_t, cond, found = setting("sd15")
    expected = features(model, x_t, cond, found)
    backbone: Any = model.backbone
    backbone.set_attention_slice(1)
    require_equal(features(model, x_t, cond, found), expected, atol=1e-5)
    with pytest.raises(IncompatibleModelError, match="SlicedAttnProcessor"):
        activations_of(model, x_t, T, cond, found.named(["mid-vit0-cross-map"]))


def test_gradient_checkpointing_outside_training() -> None:
    model, x_t, cond, found = setting("sd15")
    expected = features(model, x_t, cond, found)
    backbone: Any = model.backbone
    backbone.enable_gradient_checkpointing()
    require_equal(features(model, x_t, cond, found), expected)
    with pytest.raises(IncompatibleModelError, match=r"while gradients are kept; call its disable_gradient_"):
        features(model, x_t, cond, found, grad=True)
    backbone.train()
    with pytest.raises(IncompatibleModelError, match=r"UNet2DConditionModel .* in training mode; call its eval\(\)"):
        features(model, x_t, cond, found)


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_live_adapters_are_seen_and_equal_merged_ones(name: str) -> None:
    model, x_t, cond, found = setting(name)
    expected = features(model, x_t, cond, found)
    backbone: Any = model.backbone
    targets = ["to_q", "to_k", "to_v", "proj_mlp", "ff.net.0.proj"]
    backbone.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=targets, init_lora_weights=False))
    assert [row.name for row in inventory(backbone)] == [row.name for row in listed(name)]
    live = features(model, x_t, cond, found)
    query = next(key for key in live if key.endswith("-q"))
    assert not torch.allclose(live[query], expected[query], atol=1e-3)
    backbone.fuse_lora()
    require_equal(features(model, x_t, cond, found), live, atol=1e-4)
    backbone.unfuse_lora()
    backbone.disable_adapters()
    require_equal(features(model, x_t, cond, found), expected, atol=1e-5)


@pytest.mark.parametrize("name", ["sd15", "pixart"])
def test_offloaded_networks_send_their_weights_back_after_an_early_exit(name: str) -> None:
    model, x_t, cond, found = setting(name)
    expected = features(model, x_t, cond, found)
    whole = model.denoiser(x_t, torch.full((2,), T), cond).output
    accelerate.cpu_offload(model.backbone, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.backbone.parameters())
    early = found.match("*vit-block0-cross-q")[:1]
    taken = activations_of(model, x_t, T, cond, early)
    assert torch.equal(taken[early[0].name], expected[early[0].name])
    assert all(parameter.is_meta for parameter in model.backbone.parameters())
    assert torch.equal(model.denoiser(x_t, torch.full((2,), T), cond).output, whole)
    require_equal(features(model, x_t, cond, found), expected)
    assert inventory(model, size=(8, 8), num_text=7) == found


def test_compiled_networks_are_refused_by_name(model_of: ModelOf) -> None:
    x_t, _, cond = tiny.inputs("sd15")
    found = inventory(tiny.backbone("sd15"))
    whole, regional, own = (tiny.backbone("sd15") for _ in range(3))
    regional.mid_block.compile()
    own.compile()
    for backbone, message in (
        (cast(nn.Module, torch.compile(whole)), "OptimizedModule is compiled"),
        (regional, r"UNet2DConditionModel \(mid_block\) is compiled"),
        (own, "UNet2DConditionModel is compiled"),
    ):
        with pytest.raises(IncompatibleModelError, match=message):
            activations_of(model_of("sd15", backbone), x_t, T, cond, found.features)
        with pytest.raises(IncompatibleModelError, match=message):
            inventory(backbone)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_controlnet_residuals_reach_the_activations(name: str) -> None:
    model, x_t, cond, found = setting(name)
    plain = features(model, x_t, cond, found)
    backbone: Any = model.backbone
    network: Any = ControlNetModel.from_unet(copy.deepcopy(backbone), conditioning_channels=3)
    network = tiny.seeded(lambda: network, 0)
    added = {key: cond[key] for key in ("text_embeds", "time_ids") if key in cond} or None
    picture = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    times = torch.full((2,), T)
    down, mid = network(
        x_t, times, cond["encoder_hidden_states"], controlnet_cond=picture, added_cond_kwargs=added, return_dict=False
    )
    controlled = with_controlnet(cond, down, mid)
    taken = features(model, x_t, controlled, found)
    expected = backbone(
        x_t,
        times,
        cond["encoder_hidden_states"],
        added_cond_kwargs=added,
        down_block_additional_residuals=down,
        mid_block_additional_residual=mid,
    ).sample
    assert torch.equal(taken["unet-out"], expected)
    assert torch.equal(taken["mid-repeat1-res-out"], plain["mid-repeat1-res-out"])
    stem = "up-level0-repeat0-res-in"
    skipped = plain[found[f"skip{len(down) - 1}"].same_as or ""]
    torch.testing.assert_close(taken[stem], torch.cat([plain["mid-repeat1-res-out"] + mid, skipped + down[-1]], 1))
    single = {key: value[:1] if key.endswith("residual") else value for key, value in controlled.items()}
    features(model, x_t, single, found)
    with pytest.raises(ValueError, match="lacks mid_block_additional_residual"):
        features(model, x_t, {key: value for key, value in controlled.items() if not key.startswith("mid")}, found)
    with pytest.raises(ValueError, match=r"has down_block_additional_residuals\.9"):
        features(model, x_t, controlled | {"down_block_additional_residuals.9": mid}, found)


def test_replaced_modules_have_the_new_features(model_of: ModelOf) -> None:
    model, x_t, cond, found = setting("sd15")
    other = replace(model, denoiser=model_of("sd15", tiny.backbone("sd15", 1)).denoiser)
    one, two = (features(each, x_t, cond, found) for each in (model, other))
    assert all(not torch.equal(one[name], two[name]) for name in one if name != "unet-in")
