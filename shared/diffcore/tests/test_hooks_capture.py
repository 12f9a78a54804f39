import gc
import threading
import weakref

import accelerate
import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.distributed.fsdp import fully_shard

from diffcore.errors import IncompatibleModelError, NoMatchError
from diffcore.hooks import Site, attention_probs, capture, clear, intervene
from diffcore.models.backbones import backbone_call
from diffcore.stats import RunningMoments
from diffcore.testing import tiny

# An early and a late site per family.
SITES = {
    "sd15": ["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v", "mid_block"],
    "sdxl": ["down_blocks.1.resnets.0", "mid_block.attentions.0"],
    "unet2d": ["conv_in", "mid_block.resnets.1"],
    "dit": ["pos_embed", "transformer_blocks.0.attn1.to_q"],
    "pixart": ["caption_projection", "transformer_blocks.0"],
    "sd3": ["context_embedder", "transformer_blocks.0.attn"],
    "flux": ["x_embedder", "transformer_blocks.0.attn.norm_q"],
}


@pytest.fixture(scope="module", params=tiny.NAMES)
def family(request):
    return request.param, tiny.denoiser(request.param), tiny.inputs(request.param)


@pytest.fixture(scope="module")
def sd15():
    return tiny.denoiser("sd15"), tiny.inputs("sd15")


def num_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_early_exit_gives_the_bits_of_a_full_pass(family):
    name, denoiser, inputs = family
    with torch.no_grad():
        expected = denoiser(*inputs).output
        with capture(denoiser.backbone, SITES[name]) as full:
            output = denoiser(*inputs).output
        finished = False
        with capture(denoiser.backbone, SITES[name], stop=True) as stopped:
            denoiser(*inputs)
            finished = True
    assert not finished
    assert list(full) == list(stopped) == SITES[name]
    assert all(torch.equal(full[site], stopped[site]) for site in full)
    assert torch.equal(output, expected)
    assert num_hooks(denoiser) == 0
    assert torch.equal(denoiser(*inputs).output, expected)


def test_every_module_of_every_family_can_be_captured_and_equals_its_recomputation(family):
    name, denoiser, inputs = family
    backbone = denoiser.backbone
    linears = [n for n, m in backbone.named_modules() if isinstance(m, nn.Linear)]
    sites = [Site(n, "input", f"{n} in") for n in linears]
    with torch.no_grad(), capture(backbone, ["*", *sites, Site("")]) as activations:
        output = denoiser(*inputs)
    assert activations.silent == set()
    for linear in linears:
        again = backbone.get_submodule(linear)(activations[f"{linear} in"])
        assert torch.equal(again, activations[linear]), (name, linear)
    assert activations[""].shape[0] == len(output.output)
    assert all(value.grad_fn is None for value in activations.values())


def test_activations_are_detached_copies(sd15):
    denoiser, (x_t, t, cond) = sd15
    seen = []
    handle = denoiser.backbone.conv_in.register_forward_hook(lambda m, a, out: seen.append(out))
    with capture(denoiser.backbone, "conv_in") as activations:
        denoiser(x_t.clone().requires_grad_(), t, cond)
    handle.remove()
    assert seen[0].requires_grad
    assert not activations["conv_in"].requires_grad
    assert activations["conv_in"].data_ptr() != seen[0].data_ptr()


def test_several_firings_are_all_in_calls_and_the_first_in_the_dictionary(sd15):
    denoiser, inputs = sd15
    name = "mid_block.resnets.0.nonlinearity"
    with capture(denoiser.backbone, [name, "mid_block.resnets.0.norm?"]) as activations:
        denoiser(*inputs)
        denoiser(*inputs)
    assert len(activations.calls[name]) == 6
    assert activations[name] is activations.calls[name][0]
    first, time, second = activations.calls[name][:3]
    silu = nn.functional.silu
    assert torch.equal(first, silu(activations["mid_block.resnets.0.norm1"]))
    assert torch.equal(second, silu(activations["mid_block.resnets.0.norm2"]))
    assert time.shape == (2, 128)


def test_elements_of_tuples(sd15):
    denoiser, inputs = sd15
    block = "down_blocks.0"
    sites = [block, Site(block, "output[0]", "first"), Site(block, "output[1][0]", "resnet"), f"{block}.attentions.0"]
    with capture(denoiser.backbone, [*sites, f"{block}.downsamplers.0"]) as activations:
        denoiser(*inputs)
    assert torch.equal(activations[block], activations[f"{block}.downsamplers.0"])
    assert torch.equal(activations[block], activations["first"])
    assert torch.equal(activations["resnet"], activations[f"{block}.attentions.0"])


@pytest.mark.parametrize(("at", "message"), [("output[5]", "returned tuple of 2"), ("output[1]", "is tuple of 2, not")])
def test_an_element_that_is_not_there_or_no_tensor(sd15, at, message):
    denoiser, inputs = sd15
    with pytest.raises(TypeError, match=message), capture(denoiser.backbone, Site("down_blocks.0", at)):
        denoiser(*inputs)
    assert num_hooks(denoiser) == 0


def test_inputs_are_found_among_keywords():
    denoiser, inputs = tiny.denoiser("flux"), tiny.inputs("flux")
    with capture(denoiser.backbone, ["x_embedder", Site("transformer_blocks.0", "input")]) as activations:
        denoiser(*inputs)
    assert torch.equal(activations["transformer_blocks.0"], activations["x_embedder"])


def test_reduced_statistics_equal_those_of_stored_activations(family):
    _, denoiser, inputs = family
    names = [n for n, m in denoiser.backbone.named_modules() if isinstance(m, nn.Linear)][::4]
    moments = {n: RunningMoments(denoiser.backbone.get_submodule(n).out_features) for n in names}

    def reduce(name, x):
        moments[name].update(x.flatten(0, -2))

    with capture(denoiser.backbone, names) as stored:
        denoiser(*inputs)
        denoiser(*inputs)
    with capture(denoiser.backbone, names, reduce=reduce) as nothing:
        denoiser(*inputs)
        denoiser(*inputs)
    assert not nothing
    assert nothing.silent == set()
    for name in names:
        rows = torch.cat([x.flatten(0, -2) for x in stored.calls[name]]).double()
        count, mean, var = moments[name].compute()
        assert count == len(rows)
        torch.testing.assert_close(mean, rows.mean(0), rtol=0, atol=1e-12)
        torch.testing.assert_close(var, rows.var(0), rtol=1e-10, atol=1e-12)


def test_reduce_may_keep_something_smaller(sd15):
    denoiser, inputs = sd15
    with capture(denoiser.backbone, "*.resnets.0", reduce=lambda name, x: x.mean((2, 3))) as means:
        denoiser(*inputs)
    with capture(denoiser.backbone, "*.resnets.0") as stored:
        denoiser(*inputs)
    assert all(torch.equal(means[name], stored[name].mean((2, 3))) for name in stored)


def test_nothing_of_a_stopped_pass_stays_in_memory(sd15):
    denoiser, inputs = sd15
    alive = []
    gc.disable()
    try:
        with (
            torch.no_grad(),
            capture(denoiser.backbone, "*.resnets.0", reduce=lambda name, x: alive.append(weakref.ref(x)), stop=True),
        ):
            denoiser(*inputs)
        assert len(alive) == 5
        assert [ref() for ref in alive] == [None] * 5
    finally:
        gc.enable()


def test_after_an_exception_no_hook_is_left_and_hooks_of_others_stay(sd15):
    denoiser, inputs = sd15
    others = denoiser.backbone.conv_in.register_forward_hook(lambda *_: None)

    def fail(name, x):
        raise RuntimeError("in the middle")

    before = denoiser(*inputs).output
    with pytest.raises(RuntimeError, match="in the middle"), capture(denoiser.backbone, "mid_block", reduce=fail):
        denoiser(*inputs)
    with pytest.raises(KeyboardInterrupt), capture(denoiser.backbone, "*"):
        raise KeyboardInterrupt
    with pytest.raises(RuntimeError, match="in the middle"), attention_probs(denoiser.backbone, "*"):
        raise RuntimeError("in the middle")
    assert torch._C._len_torch_function_stack() == 0
    assert num_hooks(denoiser) == 1
    assert torch.equal(denoiser(*inputs).output, before)
    others.remove()


def test_clear_takes_off_what_an_accident_left_and_nothing_else(sd15):
    denoiser, inputs = sd15
    expected = denoiser(*inputs).output
    others = [
        denoiser.backbone.conv_in.register_forward_hook(lambda *_: None),
        denoiser.backbone.conv_in.register_forward_pre_hook(lambda *_: None),
    ]
    blocks = [
        capture(denoiser.backbone, [Site("conv_in", "input"), "mid_block"]),
        intervene(denoiser.backbone, {"conv_in": torch.zeros(1)}),
    ]
    for block in blocks:
        block.__enter__()
    assert num_hooks(denoiser) == 5
    assert not torch.equal(denoiser(*inputs).output, expected)
    clear(denoiser)
    assert num_hooks(denoiser) == 2
    assert torch.equal(denoiser(*inputs).output, expected)
    for block in blocks:
        block.__exit__(None, None, None)  # closing what was cleared is harmless
    for other in others:
        other.remove()
    assert num_hooks(denoiser) == 0


def test_only_the_entering_thread_is_heard(sd15):
    denoiser, inputs = sd15
    outputs = []
    with capture(denoiser.backbone, "mid_block") as activations:
        other = threading.Thread(target=lambda: outputs.append(denoiser(*inputs).output))
        other.start()
        other.join()
        assert not activations
        denoiser(*inputs)
    assert len(activations.calls["mid_block"]) == 1
    with intervene(denoiser.backbone, {"mid_block": torch.zeros(1)}):
        other = threading.Thread(target=lambda: outputs.append(denoiser(*inputs).output))
        other.start()
        other.join()
    assert torch.equal(outputs[0], outputs[1])


def test_gradient_checkpointing_counts_each_forward_once():
    backbone = tiny.backbone("sd15").requires_grad_(True).train()
    x_t, t, cond = tiny.inputs("sd15")

    def gradient(patterns):
        backbone.zero_grad()
        with capture(backbone, patterns) as activations, attention_probs(backbone, "*.attn2") as maps:
            backbone(x_t, t, **cond).sample.square().sum().backward()
        return activations, maps, backbone.conv_in.weight.grad.clone()

    plain, plain_maps, expected = gradient("*.resnets.0*")
    backbone.enable_gradient_checkpointing()
    fired = []
    others = backbone.down_blocks[0].resnets[0].conv1.register_forward_hook(lambda *_: fired.append(1))
    checkpointed, maps, grad = gradient("*.resnets.0*")
    others.remove()
    assert len(fired) > 1  # the second run did happen
    assert {n: len(x) for n, x in checkpointed.calls.items()} == {n: len(x) for n, x in plain.calls.items()}
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)
    assert {n: len(x) for n, x in maps.calls.items()} == {n: len(x) for n, x in plain_maps.calls.items()}
    torch.testing.assert_close(grad, expected)


def test_an_outer_block_may_stop_an_inner_one(sd15):
    denoiser, inputs = sd15
    reached = False
    with capture(denoiser.backbone, "conv_in", stop=True) as outer:
        with capture(denoiser.backbone, "mid_block", stop=True) as inner:
            denoiser(*inputs)
        reached = True
    assert not reached
    assert list(outer) == ["conv_in"]
    assert inner.silent == {"mid_block"}
    with capture(denoiser.backbone, "mid_block") as outer:
        with capture(denoiser.backbone, "conv_in", stop=True):
            denoiser(*inputs)
        reached = True
    assert reached
    assert not outer
    assert num_hooks(denoiser) == 0


def test_missing_names_say_why(sd15):
    denoiser, inputs = sd15
    with capture(denoiser.backbone, ["conv_in", "mid_block"], reduce=lambda name, x: None) as activations:
        denoiser.backbone.conv_in(inputs[0])
    with pytest.raises(NoMatchError, match="'mid_block' was never called in this block"):
        activations["mid_block"]
    with pytest.raises(NoMatchError, match="reduce returned nothing for 'conv_in'"):
        activations["conv_in"]
    with pytest.raises(NoMatchError, match="'x' was not captured; captured were: conv_in, mid_block"):
        activations["x"]


def test_wanted_must_be_something_and_names_unique(sd15):
    denoiser, _ = sd15
    with pytest.raises(ValueError, match="no pattern and no site"), capture(denoiser, []):
        pass
    same = [Site("backbone.conv_in"), Site("backbone.conv_in", "input")]
    with pytest.raises(ValueError, match=r"two sites are called 'backbone\.conv_in'"), capture(denoiser, same):
        pass


def test_layerwise_casting_survives_early_exit(sd15):
    _, (x_t, t, cond) = sd15
    backbone = tiny.backbone("sd15")
    backbone.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    expected = backbone(x_t, t, **cond).sample
    with capture(backbone, "mid_block", stop=True) as activations:
        backbone(x_t, t, **cond)
    assert activations["mid_block"].dtype == torch.float32
    assert torch.equal(backbone(x_t, t, **cond).sample, expected)


def test_offloaded_networks_survive_early_exit(sd15):
    """Groups of layers come to the device for their turn: a pass that is broken off leaves the next one whole."""
    _, (x_t, t, cond) = sd15
    backbone = tiny.backbone("sd15")
    expected = backbone(x_t, t, **cond).sample
    backbone.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    with capture(backbone, "mid_block") as whole:
        backbone(x_t, t, **cond)
    with capture(backbone, "mid_block", stop=True) as activations:
        backbone(x_t, t, **cond)
    assert torch.equal(activations["mid_block"], whole["mid_block"])
    assert torch.equal(backbone(x_t, t, **cond).sample, expected)


def test_weights_that_accelerate_brought_go_back_after_an_early_exit():
    """Blocks of PixArt have weights of their own, which are loaded while a layer inside ends the pass."""
    denoiser, (x_t, t, cond) = tiny.denoiser("pixart"), tiny.inputs("pixart")
    expected = denoiser(x_t, t, cond).output
    accelerate.cpu_offload(denoiser.backbone, execution_device=torch.device("cpu"))
    with capture(denoiser, "*.1.attn1.to_q", stop=True):
        denoiser(x_t, t, cond)
    assert all(parameter.is_meta for parameter in denoiser.parameters())
    assert torch.equal(denoiser(x_t, t, cond).output, expected)


def test_live_adapters_are_seen(sd15):
    """A site that PEFT has wrapped gives what the network goes on with: base output and update together."""
    _, (x_t, t, cond) = sd15
    site = SITES["sd15"][0]
    backbone = tiny.backbone("sd15")
    with capture(backbone, site) as before:
        backbone(x_t, t, **cond)
    backbone.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_v"], init_lora_weights=False))
    with capture(backbone, [site, f"{site}.base_layer"], stop=True) as after:
        backbone(x_t, t, **cond)
    layer = backbone.get_submodule(site)
    update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    expected = cond["encoder_hidden_states"] @ (layer.base_layer.weight + update).T
    torch.testing.assert_close(after[site], expected.detach(), rtol=0, atol=1e-5)
    assert torch.equal(after[f"{site}.base_layer"], before[site])
    assert not torch.allclose(after[site], before[site], atol=1e-3)


# --- networks that hooks cannot serve


def every_block(model, pattern):
    return [capture(model, pattern), intervene(model, {pattern: torch.ones(1)}), attention_probs(model, "*")]


def test_compiled_networks_are_refused():
    backbone = tiny.backbone("sd15")
    for block in every_block(torch.compile(backbone, backend="eager"), "*.mid_block"):
        with pytest.raises(IncompatibleModelError, match=r"OptimizedModule is compiled, .*; use it before"), block:
            pass
    backbone.mid_block.compile(backend="eager")
    for block in every_block(backbone, "conv_in"):
        with pytest.raises(IncompatibleModelError, match=r"\(mid_block\) is compiled"), block:
            pass
    assert num_hooks(backbone) == 0


def test_replicas_are_refused():
    wrapped = nn.DataParallel(tiny.backbone("sd15"))
    with capture(wrapped, "mid_block"):
        pass
    wrapped.device_ids = [0, 1]  # as on a machine with two accelerators
    for block in every_block(wrapped, "mid_block"):
        with pytest.raises(IncompatibleModelError, match=r"runs on 2 devices at once; use its \.module"), block:
            pass


def test_sharded_networks_are_refused_only_for_early_exit(tmp_path):
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        backbone = tiny.backbone("dit")
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        fully_shard(backbone, mesh=mesh)
    finally:
        torch.distributed.destroy_process_group()
    with capture(backbone, "transformer_blocks.0"):
        pass
    with (
        pytest.raises(IncompatibleModelError, match=r"FSDPDiTTransformer2DModel is sharded .*use stop=False"),
        capture(backbone, "transformer_blocks.0", stop=True),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "silent", "audible"),
    [
        ("sd15", ["*.attn1.to_q", "*.attn1.to_v", "*.attn2.to_k"], ["*.attn2.to_q", "*.attn1.to_qkv", "*.attn2.to_kv"]),
        ("sd3", ["*.attn.to_k", "*.attn.add_v_proj"], ["*.attn.to_qkv", "*.attn.to_added_qkv"]),
        ("flux", ["*.attn.to_k", "*.attn.add_q_proj"], ["*.attn.to_qkv", "*.attn.to_added_qkv"]),
    ],
)
def test_fused_projections_are_refused_where_they_are_silent(name, silent, audible):
    # The library's fused SD3 processor knows neither the dual attention nor the norms of SD 3.5.
    backbone = tiny.backbone(name, **({"dual_attention_layers": (), "qk_norm": None} if name == "sd3" else {}))
    call, inputs = backbone_call(backbone), tiny.inputs(name)
    with torch.no_grad():
        backbone.fuse_qkv_projections()
    for pattern in silent:
        for block in (capture(backbone, pattern), intervene(backbone, {pattern: torch.ones(1)})):
            with (
                pytest.raises(IncompatibleModelError, match=r"while projections are fused; call unfuse_qkv_proj"),
                block,
            ):
                pass
    with capture(backbone, audible) as activations:
        call(backbone, *inputs)
    assert activations.silent == set()
    backbone.unfuse_qkv_projections()
    with capture(backbone, silent) as activations:
        call(backbone, *inputs)
    assert activations.silent == set()


class InPlace(nn.Module):
    """A network that changes what its modules put out: by an activation, by half of the channels, through a view."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.act(self.first(x))
        y = self.second(x)
        y[:, :2] *= 3
        z = self.third(y)
        z.view(-1).add_(1)
        return z


@pytest.mark.parametrize("site", ["first", "second", "third", Site("act", at="input"), Site("third", at="input")])
@pytest.mark.parametrize(
    "reduce",
    [None, lambda name, x: x, lambda name, x: x[:, 1:], lambda name, x: x.mT, lambda name, x: x.mean(0)],
    ids=["whole", "as it is", "a part", "turned", "computed"],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_activations_stay_what_the_module_put_out(site, reduce, mode):
    torch.manual_seed(0)
    net, x = InPlace(), torch.randn(5, 4)
    x.requires_grad_(False)
    copies = []
    with mode(), capture(net, site, reduce=lambda name, value: copies.append(value.clone())):
        net(x)
    expected = copies[0] if reduce is None else reduce("", copies[0])
    with mode(), capture(net, site, reduce=reduce) as seen:
        net(x)
    assert torch.equal(next(iter(seen.values())), expected)


@pytest.mark.parametrize("pack", [lambda x: (x, x.mean()), lambda x: {"x": x}, lambda x: [x[0]], lambda x: x.numpy()])
def test_what_would_change_with_the_network_is_refused(pack):
    net, told = InPlace(), r"reduce returned a \w+ for 'first'; return a tensor"
    with torch.no_grad(), pytest.raises(TypeError, match=told), capture(net, "first", reduce=lambda name, x: pack(x)):
        net(torch.randn(5, 4))


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_free_u_changes_no_activation(family):
    denoiser, inputs = tiny.denoiser(family), tiny.inputs(family)
    denoiser.backbone.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    copies = {}

    def copy(name, x):
        copies.setdefault(name, x.clone())

    with torch.no_grad(), capture(denoiser.backbone, "*") as seen, capture(denoiser.backbone, "*", reduce=copy):
        denoiser(*inputs)
    assert len(copies) > 50
    assert all(torch.equal(seen[name], copies[name]) for name in copies)
