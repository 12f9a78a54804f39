import json
from pathlib import Path

import diffusers
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import diffcore.testing.real_configs
from diffcore.errors import NoMatchError
from diffcore.hooks import capture, intervene, trace_sites
from diffcore.models import site_table
from diffcore.models.backbones import backbone_call
from diffcore.testing import tiny

REAL = Path(diffcore.testing.real_configs.__file__).parent


def on_meta(name, class_name=None, **changes):
    """Returns a published backbone on the meta device; `changes` replace single settings."""
    part = "unet" if (REAL / name / "unet").exists() else "transformer"
    config = json.loads((REAL / name / part / "config.json").read_text())
    config |= changes
    with torch.device("meta"):
        return getattr(diffusers, class_name or config["_class_name"]).from_config(config)


@pytest.fixture(scope="module", params=tiny.NAMES)
def family(request):
    """A tiny backbone, one row of its inputs, and its table."""
    network = tiny.backbone(request.param)
    x_t, t, cond = tiny.inputs(request.param, batch=1)
    return network, (x_t, t, cond), site_table(network, size=(8, 8), cond=cond)


def run(network, inputs):
    """One forward pass whose attention products are counted: the fused kernel of CPUs is not."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        backbone_call(network)(network, *inputs)
    return counter.get_total_flops()


def test_every_tensor_of_the_table_is_there_in_a_real_pass(family):
    network, inputs, table = family
    seen, calls = {}, {}

    def note(name, x):
        seen.setdefault(name, tuple(x.shape[1:] if len(x) == 1 else x.shape))
        calls[name] = calls.get(name, 0) + 1

    with torch.no_grad(), capture(network, [row.site for row in table], reduce=note):
        backbone_call(network)(network, *inputs)
    assert list(seen) == [row.name for row in table]  # in order of execution
    assert seen == {row.name: row.shape for row in table}
    assert calls == {row.name: row.calls for row in table}
    assert {row.site.module for row in table} >= {name for name, m in network.named_modules() if not is_list(m)}
    assert all(row.kind == type(network.get_submodule(row.site.module)).__name__ for row in table)


def is_list(module):
    return isinstance(module, nn.ModuleList)


def test_cumulative_operations_are_those_of_a_stopped_pass(family):
    network, inputs, table = family
    total = run(network, inputs)
    assert table.flops == total
    for row in list(table)[:: max(len(table) // 8, 1)]:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            stopped(network, row.site, inputs)
        assert row.flops == counter.get_total_flops(), row.name
        assert row.cost == pytest.approx(row.flops / total)
    assert [row.flops for row in table] == sorted(row.flops for row in table)


def stopped(network, site, inputs):
    with capture(network, site, stop=True):
        backbone_call(network)(network, *inputs)


def test_the_same_tensor_is_named_once(family):
    """Rows that are told to be one tensor have equal bits; of the others' values, some differ from each earlier one."""
    network, inputs, table = family
    with torch.no_grad(), capture(network, [row.site for row in table]) as found:
        backbone_call(network)(network, *inputs)
    repeated = [row for row in table if row.same_as]
    assert len(repeated) > 20
    assert all(torch.equal(found[row.name], found[row.same_as]) for row in repeated)
    assert all(table[row.same_as].same_as is None for row in repeated)


def test_the_weights_stay_where_they_are_and_hooks_are_not_called():
    network = tiny.backbone("sd15")
    before = {name: (id(p), p.clone()) for name, p in network.named_parameters()}
    network.conv_in.register_forward_hook(lambda *_: pytest.fail("a hook of the network was called"))
    with intervene(network, {"mid_block": torch.ones(1)}):
        table = site_table(network, size=(8, 8), cond=7)
    assert {name: id(p) for name, p in network.named_parameters()} == {name: i for name, (i, _) in before.items()}
    assert all(torch.equal(p, before[name][1]) for name, p in network.named_parameters())
    assert table.rows == site_table(tiny.backbone("sd15", seed=1), size=(8, 8), cond=7).rows


def test_offloaded_half_precision_and_meta_networks_have_the_same_table():
    expected = site_table(tiny.backbone("sd15"), cond=7).rows
    offloaded = tiny.backbone("sd15")
    offloaded.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    assert site_table(offloaded, cond=7).rows == expected
    assert site_table(tiny.backbone("sd15").to(torch.bfloat16), cond=7).rows == expected
    assert site_table(tiny.backbone("sd15").to("meta"), cond=7).rows == expected


def test_maps_tokens_text_and_heads_are_told_apart():
    unet = site_table(tiny.backbone("sd15"), size=(16, 8), cond=7)
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    expected = {
        "down_blocks.0.resnets.0": ("channels height width", 32, (16, 8), 0),
        "mid_block": ("channels height width", 64, (8, 4), 0),
        f"{block}.attn2.to_q": ("tokens channels", 32, (16, 8), 0),
        f"{block}.attn2.to_v": ("tokens channels", 32, None, 7),
        f"{block}.ff.net.0": ("tokens channels", 128, (16, 8), 0),
        "time_embedding": ("channels", 128, None, 0),
        "time_proj:input": ("", None, None, 0),
    }
    assert {name: described(unet[name]) for name in expected} == expected
    flux = site_table(tiny.backbone("flux"), size=(16, 8), cond=7)
    expected = {
        "transformer_blocks.0.attn.norm_q": ("tokens heads channels", 32, (8, 4), 0),
        "transformer_blocks.0": ("tokens channels", 32, None, 7),
        "transformer_blocks.0:output[1]": ("tokens channels", 32, (8, 4), 0),
        "single_transformer_blocks.0.attn.to_q": ("tokens channels", 32, (8, 4), 7),
    }
    assert {name: described(flux[name]) for name in expected} == expected
    sd3 = site_table(tiny.backbone("sd3"), size=(16, 8), cond=7)
    assert described(sd3["transformer_blocks.0.attn.norm_k"]) == ("heads tokens channels", 32, (8, 4), 0)


def described(row):
    return row.axes, row.channels, row.grid, row.num_text


class Twice(nn.Module):
    """One layer runs twice, one never, and one changes its input in place."""

    def __init__(self):
        super().__init__()
        self.twice, self.never, self.act = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.twice(self.twice(x)))


def test_calls_are_counted_and_what_never_runs_comes_last():
    x = torch.empty(1, 4, 6, 6, device="meta")
    table = trace_sites(Twice(), lambda network: network(x), size=(6, 6))
    one_call = 2 * 4 * 4 * 36
    assert [(row.name, row.calls, row.flops) for row in table] == [
        (":input", 1, 0),
        ("twice:input", 2, 0),
        ("twice", 2, one_call),
        ("act:input", 1, 2 * one_call),
        ("act", 1, 2 * one_call),
        ("", 1, 2 * one_call),
        ("never", 0, 0),
    ]
    assert table["never"].shape is None
    assert table["twice:input"].same_as == ":input"
    assert (table["act"].same_as, table[""].same_as) == (None, "act")  # changed in place: no longer its input


def test_rows_are_chosen_by_pattern_and_cost_what_the_last_one_costs():
    x = torch.empty(1, 4, 6, 6, device="meta")
    table = trace_sites(Twice(), lambda network: network(x), size=(6, 6))
    assert [row.name for row in table.match(["a*", "twice"])] == ["twice", "act:input", "act"]
    assert table.match("twice").cost == 0.5
    assert table.match("act").cost == 1.0
    assert table.match(["twice", "never"]).cost == 1.0  # a pass that waits for it never stops
    with pytest.raises(NoMatchError, match=r"no site matches 'b\*'"):
        table.match(["a*", "b*"])
    with pytest.raises(NoMatchError, match="no site is called 'a'"):
        table["a"]
    json.dumps(table.to_rows())
    assert table.to_rows()[2] == {
        "name": "twice",
        "module": "twice",
        "at": "output",
        "kind": "Conv2d",
        "shape": (4, 6, 6),
        "axes": "channels height width",
        "channels": 4,
        "grid": (6, 6),
        "num_text": 0,
        "calls": 2,
        "flops": 1152,
        "cost": 0.5,
        "same_as": None,
    }


# TFLOP of one pass (two per multiplication), and shares of it, as measured once on real weights' configurations.
@pytest.mark.parametrize(
    ("name", "teraflops", "cost"),
    [
        (
            "sd15",
            0.803,
            {
                "down_blocks.0.resnets.0": 0.019,
                "down_blocks.2.downsamplers.0": 0.301,
                "mid_block.attentions.0": 0.321,
                "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_q": 0.447,
                "up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_k": 0.798,
            },
        ),
        pytest.param(
            "sdxl",
            6.761,
            {"mid_block": 0.434, "up_blocks.0.attentions.0.transformer_blocks.5": 0.508},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_full_size_networks_cost_what_is_known(name, teraflops, cost):
    table = site_table(on_meta(name))
    assert round(table.flops / 1e12, 3) == teraflops
    assert {site: round(table[site].cost, 3) for site in cost} == cost


@pytest.mark.parametrize(
    ("name", "class_name", "text", "channels"),
    [
        ("pixart-alpha", "PixArtTransformer2DModel", 120, 4608),
        ("sd3", None, 333, 6144),
        ("flux-dev", None, 512, 12288),
    ],
)
def test_blocks_of_full_width_transformers_cost_the_same(name, class_name, text, channels):
    single = {"num_single_layers": 2} if name == "flux-dev" else {}
    table = site_table(on_meta(name, class_name, num_layers=5, **single), size=(128, 96), cond=text)
    flops = [table[f"transformer_blocks.{block}"].flops for block in range(1, 4)]
    assert flops[2] - flops[1] == flops[1] - flops[0] > table.flops / 100
    assert described(table["transformer_blocks.2.ff.net.0"]) == ("tokens channels", channels, (64, 48), 0)


def test_a_transformer_of_classes_is_listed():
    with torch.device("meta"):
        network = diffusers.DiTTransformer2DModel(num_layers=4, sample_size=32, out_channels=8)
    row = site_table(network)["transformer_blocks.1"]
    assert described(row) == ("tokens channels", 1152, (16, 16), 0)
    assert row.cost == pytest.approx(0.5, abs=0.01)
