import math

import jaxtyping
import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.transformers import transformer_flux
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from diffcore.errors import IncompatibleModelError, NoMatchError
from diffcore.hooks import attention_probs, capture
from diffcore.hooks.scores import AttentionCall
from diffcore.models.backbones import backbone_call
from diffcore.testing import tiny

NUM_ATTENTIONS = {"sd15": 8, "sdxl": 16, "unet2d": 4, "dit": 2, "pixart": 4, "sd3": 3, "flux": 2}


class Calls(TorchFunctionMode):
    """Keeps value and result of every fused call: the oracle."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            self.seen.append((kwargs.get("value", args[2] if len(args) > 2 else None), output))
        return output


@pytest.fixture(scope="module", params=tiny.NAMES)
def family(request):
    return request.param, tiny.denoiser(request.param), tiny.inputs(request.param)


@pytest.fixture(scope="module")
def sd15():
    return tiny.denoiser("sd15"), tiny.inputs("sd15")


def num_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_maps_times_values_equal_the_fused_kernel_and_rows_sum_to_one(family):
    name, denoiser, inputs = family
    expected = denoiser(*inputs).output
    with attention_probs(denoiser.backbone, "*", check=True) as maps, Calls() as calls:
        output = denoiser(*inputs).output
    assert torch.equal(output, expected)
    assert len(maps) == len(calls.seen) == NUM_ATTENTIONS[name]
    assert maps.silent == set()
    for (value, fused), probs in zip(calls.seen, maps.values(), strict=True):
        torch.testing.assert_close(probs @ value, fused, rtol=0, atol=1e-6)
        torch.testing.assert_close(probs.sum(-1), torch.ones(probs.shape[:-1]), rtol=0, atol=1e-5)
        assert not probs.requires_grad
    assert num_hooks(denoiser) == 0


def test_reductions_equal_those_of_the_full_maps(family):
    name, denoiser, inputs = family

    def reduced(reduce, **options):
        with attention_probs(denoiser.backbone, "*", reduce=reduce, **options) as maps:
            denoiser(*inputs)
        return maps

    # So small that each chunk holds one query of the larger maps.
    full, tiny_chunks = reduced(None), {"chunk_megabytes": 0}
    for options in ({}, tiny_chunks):
        for wanted, own in (
            (None, lambda p: p),
            ("mean_heads", lambda p: p.mean(1)),
            ("entropy", lambda p: -(p * p.clamp(min=1e-38).log()).sum(-1)),
            ((lambda name, p: p.amax(1)), lambda p: p.amax(1)),
        ):
            for key, value in reduced(wanted, **options).items():
                torch.testing.assert_close(value, own(full[key]), rtol=1e-5, atol=1e-6)
        for key, value in reduced("per_token", **options).items():
            probs = full[key].mean(1)
            if probs.shape[1] == probs.shape[2] == 23:  # 16 places and 7 text tokens attend jointly
                probs = probs[:, 7:, :7] if name == "flux" else probs[:, :16, 16:]
            side = math.isqrt(probs.shape[1])
            picture = probs.transpose(1, 2).unflatten(2, (side, side))
            torch.testing.assert_close(value, picture, rtol=1e-5, atol=1e-6)


def test_maps_equal_those_of_captured_queries_and_keys(sd15):
    denoiser, inputs = sd15
    name = "mid_block.attentions.0.transformer_blocks.0.attn2"
    with attention_probs(denoiser.backbone, name) as maps, capture(denoiser.backbone, f"{name}.to_?") as parts:
        denoiser(*inputs)
    query, key = (parts[f"{name}.to_{part}"].unflatten(-1, (8, -1)).transpose(1, 2) for part in "qk")
    expected = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
    torch.testing.assert_close(maps[name], expected, rtol=0, atol=1e-6)


def test_masked_tokens_get_nothing():
    denoiser, inputs = tiny.denoiser("pixart"), tiny.inputs("pixart")
    assert inputs[2]["encoder_attention_mask"].sum(1).tolist() == [4, 4]
    with attention_probs(denoiser.backbone, "*.attn2", reduce="per_token") as maps:
        denoiser(*inputs)
    for value in maps.values():
        assert value[:, :4].amin() > 0
        assert value[:, 4:].amax() == 0


@pytest.mark.parametrize(
    ("name", "size"), [("sd15", (8, 16)), ("sd15", (10, 6)), ("unet2d", (8, 4)), ("sd3", (4, 8)), ("flux", (4, 12))]
)
def test_pictures_of_samples_that_are_not_square(name, size):
    denoiser = tiny.denoiser(name)
    x_t, t, cond = tiny.inputs(name)
    x_t = torch.randn(2, x_t.shape[1], *size)
    with attention_probs(denoiser.backbone, "*", reduce="per_token") as maps:
        denoiser(x_t, t, cond)
    for value in maps.values():
        height, width = value.shape[-2:]
        assert height * size[1] == width * size[0]


def test_without_the_whole_network_places_must_be_a_square(sd15):
    attention = sd15[0].backbone.mid_block.attentions[0].transformer_blocks[0].attn1
    for num_places, shape in ((16, (2, 16, 4, 4)), (15, None)):
        block = attention_probs(sd15[0].backbone, "mid_block*attn1", reduce="per_token")
        if shape is None:
            with pytest.raises(ValueError, match="15 places are no picture of a 3x3 sample"), block:
                attention(torch.randn(2, num_places, 64))
        else:
            with block as maps:
                attention(torch.randn(2, num_places, 64))
            assert next(iter(maps.values())).shape == shape


def test_image_and_text_of_flux_need_the_whole_network():
    backbone = tiny.backbone("flux")
    block = attention_probs(backbone, "single*", reduce="per_token")
    with pytest.raises(ValueError, match="image and text cannot be told apart"), block:
        backbone.single_transformer_blocks[0].attn(torch.randn(1, 5, 32))


def test_vae_attends_over_maps():
    vae = tiny.vae()
    with attention_probs(vae, "encoder*", reduce="per_token", check=True) as maps:
        vae.encode(torch.randn(1, 3, 8, 16))  # no call of the whole network
    assert [tuple(value.shape) for value in maps.values()] == [(1, 32, 4, 8)]


def test_text_encoders_attend_causally():
    encoder = tiny.text_encoder()
    with attention_probs(encoder, "text_model.encoder.layers.*", check=True) as maps:
        encoder(input_ids=torch.tensor([[512, 5, 7, 513]]))
    assert len(maps) == 2
    for probs in maps.values():
        assert probs.shape == (1, 4, 4, 4)
        assert not probs.triu(1).any()


def test_time_adds_up(sd15):
    denoiser, inputs = sd15
    other = tiny.inputs("sd15", seed=1)
    kept = {}
    for reduce in (None, "sum_over_time", "per_token", ("per_token", "sum_over_time")):
        with attention_probs(denoiser.backbone, "*.attn2", reduce=reduce) as maps:
            denoiser(*inputs)
            denoiser(*other)
        kept[reduce] = maps
    for plain, summed in ((None, "sum_over_time"), ("per_token", ("per_token", "sum_over_time"))):
        for name, (first, second) in kept[plain].calls.items():
            assert not torch.equal(first, second)
            assert torch.equal(kept[plain][name], first)
            torch.testing.assert_close(kept[summed][name], first + second, rtol=0, atol=1e-6)
            assert kept[summed].calls[name] == []
        assert kept[summed].silent == set()


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "pixart"])
def test_fused_projections_give_the_same_maps(name):
    # The library's fused SD3 processor knows neither the dual attention nor the norms of SD 3.5.
    backbone = tiny.backbone(name, **({"dual_attention_layers": (), "qk_norm": None} if name == "sd3" else {}))
    call, inputs = backbone_call(backbone), tiny.inputs(name)
    with attention_probs(backbone, "*") as plain:
        call(backbone, *inputs)
    with torch.no_grad():
        backbone.fuse_qkv_projections()
    with attention_probs(backbone, "*", check=True) as fused:
        call(backbone, *inputs)
    assert list(plain) == list(fused)
    for key, value in plain.items():
        torch.testing.assert_close(fused[key], value, rtol=0, atol=1e-6)


def test_half_precision_gives_float32_maps():
    backbone = tiny.backbone("sd15").to(torch.bfloat16)
    x_t, t, cond = tiny.inputs("sd15")
    with attention_probs(backbone, "*", check=True) as maps:
        backbone(x_t.bfloat16(), t, encoder_hidden_states=cond["encoder_hidden_states"].bfloat16())
    for probs in maps.values():
        assert probs.dtype == torch.float32
        torch.testing.assert_close(probs.sum(-1), torch.ones(probs.shape[:-1]))


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"enable_gqa": True, "scale": 0.3}, {"mask": "row"}])
def test_every_argument_of_the_fused_kernel_is_understood(options):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, length, 8, generator=generator, dtype=torch.float64)
        for heads, length in (
            (4, 6),
            (2 if "enable_gqa" in options else 4, 9),
            (2 if "enable_gqa" in options else 4, 9),
        )
    )
    options = dict(options)
    if options.pop("mask", None):
        options["attn_mask"] = torch.rand(2, 1, 6, 9, generator=generator) < 0.5
        options["attn_mask"][0, 0, 2] = False  # a query that may look nowhere
        options["attn_mask"][:, :, 3] = True
    expected = functional.scaled_dot_product_attention(query, key, value, **options)
    call = AttentionCall(query, key, value, **options)
    for most_bytes in (2**28, 2 * 4 * 9 * 8 * 4):
        errors = [call.error(chunk, expected) for chunk in call.chunks(range(6), most_bytes)]
        assert len(errors) == (1 if most_bytes == 2**28 else 2)
        assert float(max(errors)) < 1e-12


def test_check_notices_a_wrong_map(sd15, monkeypatch):
    denoiser, inputs = sd15
    probs = AttentionCall.probs
    monkeypatch.setattr(AttentionCall, "probs", lambda self, queries: probs(self, queries) * 1.001)
    with (
        pytest.raises(IncompatibleModelError, match=r"map of 'down_blocks.*attn1' times its values differs by"),
        attention_probs(denoiser.backbone, "*", check=True),
    ):
        denoiser(*inputs)
    assert num_hooks(denoiser) == 0


def test_other_backends_are_named_with_the_way_back(monkeypatch):
    def sage(query, key, value, **options):
        del key, options
        return query * value

    denoiser, inputs = tiny.denoiser("flux"), tiny.inputs("flux")
    monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", sage)
    for backend, named in ((AttentionBackendName.SAGE, "attention backend sage"), (None, "another attention backend")):
        monkeypatch.setattr(transformer_flux.FluxAttnProcessor, "_attention_backend", backend)
        with (
            pytest.raises(
                IncompatibleModelError, match=rf'uses {named}; call model\.set_attention_backend\("native"\) f'
            ),
            attention_probs(denoiser.backbone, "*"),
        ):
            denoiser(*inputs)


def test_processors_without_the_fused_kernel_are_named():
    denoiser, inputs = tiny.denoiser("sd15"), tiny.inputs("sd15")
    denoiser.backbone.set_attn_processor(AttnProcessor())
    with (
        pytest.raises(
            IncompatibleModelError, match=r"attn1' uses AttnProcessor; call its set_processor\(AttnProcessor2_0"
        ),
        attention_probs(denoiser.backbone, "*.attn1"),
    ):
        denoiser(*inputs)


def test_modules_that_attend_twice_have_no_single_map(sd15):
    class Twice:
        def __call__(self, attn, hidden_states, *args, **kwargs):
            query = attn.to_q(hidden_states).unsqueeze(1)
            functional.scaled_dot_product_attention(query, query, query)
            return functional.scaled_dot_product_attention(query, query, query).squeeze(1)

    backbone = tiny.backbone("sd15")
    attention = backbone.mid_block.attentions[0].transformer_blocks[0].attn1
    attention.set_processor(Twice())
    with (
        pytest.raises(IncompatibleModelError, match=r"attends 2 times \(Twice\)"),
        attention_probs(backbone, "mid*attn1"),
    ):
        attention(torch.randn(1, 4, 64))


def test_only_attention_modules_are_taken(sd15):
    backbone = sd15[0].backbone
    with pytest.raises(
        NoMatchError, match=r"no attention module of UNet2DConditionModel .*transformer_blocks\.0\.attn1"
    ):
        attention_probs(backbone, "*.attn1.to_q").__enter__()
    assert num_hooks(backbone) == 0


@pytest.mark.parametrize(
    ("reduce", "message"),
    [
        ("max", "`reduce` is 'max'; it may be mean_heads"),
        (("mean_heads", "entropy"), "one reduction, and"),
        (("sum_over_time", "mean_heads"), "one reduction, and"),
        (lambda name, probs: probs.sum(2), r"reduce returned shape \(2, 8, 64\) for 64 queries of"),
    ],
)
def test_unknown_reductions_are_refused(sd15, reduce, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for users: the message is ours
    denoiser, inputs = sd15
    with pytest.raises(ValueError, match=message), attention_probs(denoiser.backbone, "*", reduce=reduce):
        denoiser(*inputs)
    assert num_hooks(denoiser) == 0
