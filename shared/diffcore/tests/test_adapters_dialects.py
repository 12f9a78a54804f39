"""Adapters as other tools write them: under whatever names, the same change of weights, or a refusal by name."""

import re
import warnings
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from diffcore.adapters import Adapter, LowRank, fuse, read_adapter, write_adapter
from diffcore.errors import IncompatibleModelError
from diffcore.models.bases import base_of
from diffcore.testing import tiny

BLOCK = "mid_block.attentions.0.transformer_blocks.0"
CLIP = "text_model.encoder.layers.0.self_attn.q_proj"
T5 = "encoder.block.0.layer.0.SelfAttention.q"


def base(name):
    pipeline = tiny.pipeline(name)
    network = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
    texts = {part: module for part, module in pipeline.components.items() if part.startswith("text_encoder") and module}
    return base_of(name, texts, network)


@pytest.fixture(scope="module")
def bases():
    return {name: base(name) for name in ("sd15", "sdxl", "sd3", "flux", "pixart")}


def adapter_of(base):
    """Returns an adapter of two modules of each network."""

    def some(shapes):
        names = [
            name for name in shapes if re.search(r"(to_q|to_v|q_proj|fc1|SelfAttention\.q|DenseReluDense.wo)$", name)
        ]
        chosen = names[:1] + names[-1:] + [name for name in shapes if "resnets.0.conv1" in name][:1]
        return {name: change(shapes[name], 2 + index) for index, name in enumerate(chosen)}

    parts = {component: some(shapes) for component, shapes in base.shapes.items()}
    return Adapter(parts.pop("backbone"), parts, base.backbone)


def change(shape, rank):
    g = torch.Generator().manual_seed(sum(shape) + rank)
    return LowRank(torch.randn(rank, *shape[1:], generator=g), torch.randn(shape[0], rank, generator=g), 3.0)


def written(adapter, path, spell: Callable[[str, str], str], leaves):
    """Writes an adapter; `spell` names a module of a component, `leaves` are those of down, up and alpha."""
    tensors = {}
    for component, module, one in adapter:
        up = one.up.reshape(*one.up.shape, *(1 for _ in one.down.shape[2:]))
        for leaf, tensor in zip(leaves, (one.down, up, torch.tensor(one.alpha)), strict=True):
            tensors[f"{spell(component, module)}.{leaf}"] = tensor.contiguous()
    save_file(tensors, path)
    return path


def under(*prefixes, level="text_model.", flat=False):
    """Spells modules under a prefix per component: the backbone's first, then the text encoders'."""

    def spell(component, module):
        prefix = prefixes[0 if component == "backbone" else int(component[len("text_encoder_") :] or 1)]
        bare = module.removeprefix("text_model.")
        module = level + bare if component != "backbone" and bare.startswith("encoder.layers") else bare
        return prefix + (module.replace(".", "_") if flat else module)

    return spell


UP_DOWN, LETTERS = ("lora_down.weight", "lora_up.weight", "alpha"), ("lora_A.weight", "lora_B.weight", "alpha")
OURS = "diffusion_model."
DIALECTS = [
    ("sd15", "ComfyUI", under(OURS, "text_encoders.clip_l.transformer."), UP_DOWN),
    ("sd15", "ComfyUI, letters", under(OURS, "text_encoders.clip_l.transformer."), LETTERS),
    ("sd15", "ComfyUI, SD 2", under(OURS, "text_encoders.clip_h.transformer."), UP_DOWN),
    ("sd15", "ComfyUI's state", under("model." + OURS, "clip_l.transformer."), UP_DOWN),
    ("sd15", "OMI", under("unet.", "clip_l.", level=""), UP_DOWN),
    ("sdxl", "ComfyUI", under(OURS, "text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer."), UP_DOWN),
    (
        "sd3",
        "ComfyUI",
        under(OURS, *(f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl"))),
        LETTERS,
    ),
    ("flux", "ComfyUI", under(OURS, "text_encoders.clip_l.transformer.", "text_encoders.t5xxl.transformer."), LETTERS),
    ("flux", "ComfyUI, T5 without its name", under("transformer.", "clip_l.", "text_encoders.transformer."), LETTERS),
    ("pixart", "ComfyUI", under(OURS, "text_encoders.t5xxl.transformer."), UP_DOWN),
    ("sd15", "kohya", under("lora_unet_", "lora_te_", flat=True), UP_DOWN),
    ("sd15", "kohya, numbered", under("lora_unet_", "lora_te1_", flat=True), UP_DOWN),
    ("sd15", "kohya, without a level", under("lora_unet_", "lora_te_", level="", flat=True), UP_DOWN),
    ("sdxl", "kohya", under("lora_unet_", "lora_te1_", "lora_te2_", flat=True), UP_DOWN),
    ("sd3", "OneTrainer", under("lora_transformer_", "lora_te1_", "lora_te2_", "lora_te3_", flat=True), UP_DOWN),
    ("flux", "OneTrainer", under("lora_transformer_", "lora_te1_", "lora_te2_", flat=True), UP_DOWN),
    ("flux", "kohya's number of T5", under("lora_transformer_", "lora_te1_", "lora_te3_", flat=True), UP_DOWN),
    ("pixart", "OneTrainer", under("lora_transformer_", "lora_te_", flat=True), UP_DOWN),
    ("sd15", "LyCORIS with kohya's text encoder", under("lycoris_", "lora_te_", flat=True), UP_DOWN),
    ("flux", "LyCORIS", under("lycoris_", "lora_te1_", "lora_te2_", flat=True), UP_DOWN),
    ("flux", "LyCORIS around each network", under(*["lycoris_"] * 3, level="", flat=True), UP_DOWN),
    ("sd15", "LyCORIS around each network", under(*["lycoris_"] * 2, level="", flat=True), UP_DOWN),
    ("sd15", "without prefix", under("", "text_encoder."), LETTERS),
    ("sd15", "without prefix, old leaves", under("", "text_encoder."), ("lora.down.weight", "lora.up.weight", "alpha")),
    ("sd3", "without prefix", under("", "text_encoder.", "text_encoder_2.", "text_encoder_3."), LETTERS),
    ("pixart", "transformer", under("transformer.", "text_encoder."), LETTERS),
    ("sd15", "PEFT inside", under("unet.base_model.model.", "text_encoder."), LETTERS),
]


@pytest.mark.parametrize(
    ("name", "spell", "leaves"),
    [pytest.param(name, spell, leaves, id=f"{name}: {tool}") for name, tool, spell, leaves in DIALECTS],
)
def test_every_tensor_finds_its_place(bases, tmp_path, name, spell, leaves):
    adapter = adapter_of(bases[name])
    read = read_adapter(written(adapter, tmp_path / "a.safetensors", spell, leaves), bases[name])
    assert read.fingerprint == adapter.fingerprint


@pytest.mark.parametrize(
    ("name", "spell", "reason"),
    [
        ("sd15", under("base.", "text_encoder."), "under the prefix 'base.', which is not read"),
        ("sd15", under("unet.unet.", "text_encoder."), "under the prefix 'unet.', which is not read"),
        (
            "sd15",
            under("unet.", "text_encoders.qwen.transformer."),
            "under the prefix 'text_encoders.qwen.transformer.'",
        ),
        ("sd15", under("lora_net_", "lora_text_", flat=True), "under the prefix 'lora_net_', which is not read"),
        ("sd15", under("hada_", "lora_te_", flat=True), "of LoHa"),
        ("sd15", under("locon_unet_", "locon_te_", flat=True), "under the prefix 'locon_te_', which is not read"),
        (
            "sd15",
            under("lora_prior_unet_", "lora_prior_te_", flat=True),
            "of Stable Cascade, under the prefix 'lora_prior_'",
        ),
        ("sd15", under("unet.", "text_encoders.clip_g.transformer."), "there is no clip_g"),
        ("pixart", under(OURS, "text_encoders.clip_l.transformer."), "there is no clip_l"),
        ("sdxl", under("lycoris_", "lycoris_", "lora_te2_", level="", flat=True), "that do not fit sdxl"),
    ],
)
def test_a_prefix_that_is_not_read_is_named(bases, tmp_path, name, spell, reason):
    with pytest.raises(IncompatibleModelError, match=re.escape(reason)):
        read_adapter(written(adapter_of(bases[name]), tmp_path / "a.safetensors", spell, UP_DOWN), bases[name])


@pytest.mark.parametrize(
    ("leaf", "method"),
    [
        ("dora_scale", "DoRA"),
        ("lora_mid.weight", "a LoCon with a middle factor (Tucker)"),
        ("diff", "a full difference of weights"),
        ("diff_b", "a full difference of weights"),
        ("set_weight", "a full difference of weights"),
        ("reshape_weight", "a LoRA that reshapes its weight"),
        ("w_norm", "changes of norms"),
        ("b_norm", "changes of norms"),
        ("lora_up.bias", "a LoRA with biases"),
        ("bias_indices", "a LoRA with biases"),
        ("scalar", "a LoRA with a trained scalar"),
        ("oft_blocks", "OFT"),
        ("a1.weight", "GLoRA"),
    ],
)
@pytest.mark.parametrize("prefix", ["lycoris_", "lora_unet_", "diffusion_model.", "unet.", ""])
def test_what_is_more_than_a_lora_is_refused_by_name(bases, tmp_path, leaf, method, prefix):
    spell = under(prefix, "lora_te_", flat=prefix.endswith("_"))
    path = written(Adapter(adapter_of(bases["sd15"]).modules), tmp_path / "a.safetensors", spell, UP_DOWN)
    tensors = load_file(path)
    save_file(tensors | {f"{next(iter(tensors)).partition('.lora')[0]}.{leaf}": torch.ones(2)}, path)
    with pytest.raises(IncompatibleModelError, match=re.escape(f", of {method}, which is not supported")):
        read_adapter(path, bases["sd15"])


SPELLINGS = [
    "attn2.to_v",
    f"{BLOCK}.attn2.to_v",
    f"^{BLOCK}.attn2.to_v",
    f"^{BLOCK}.attn2.to_v$",
    f"{BLOCK}.attn2.to_v$",
    "attn2.to_v$",
    r"attn2\.to_v",
    "^" + re.escape(BLOCK) + r"\.attn2\.to_v$",
    "^attn2.to_v",  # no module has this whole name
]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_patterns_mean_what_they_mean_to_peft(tmp_path, spelling):
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["to_q", "to_v"],
        rank_pattern={spelling: 6, "to_v": 2},
        alpha_pattern={"attn1.to_q": 5, spelling: 3},
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    network = tiny.backbone("sd15")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    get_peft_model(network, config).save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path, base_of("tiny", {}, tiny.backbone("sd15")))
    merged = PeftModel.from_pretrained(tiny.backbone("sd15"), tmp_path).merge_and_unload().state_dict()
    fused = fuse(tiny.backbone("sd15"), adapter.modules).state_dict()
    assert all(torch.allclose(fused[name], tensor, atol=1e-6) for name, tensor in merged.items())
    assert any((merged[name] - before[name]).abs().max() > 0.1 for name in merged if "attn2.to_v" in name)


@pytest.mark.parametrize("level", ["", "text_model."])
def test_anchored_patterns_of_text_encoders_are_those_of_diffusers(tmp_path, level):
    """The level that newer versions of transformers dropped may stand in the pattern, in the names, or in neither."""
    pipeline = tiny.pipeline("sd15")
    torch.manual_seed(0)
    whole = "encoder.layers.1.self_attn.q_proj"
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "init_lora_weights": False}
    pipeline.text_encoder.add_adapter(LoraConfig(**config, rank_pattern={whole: 2}, alpha_pattern={whole: 3}))
    state = get_peft_model_state_dict(pipeline.text_encoder)
    stated = {**config, "rank_pattern": {f"^{level}{whole}": 2}, "alpha_pattern": {f"^{level}{whole}$": 3}}
    pipeline.save_lora_weights(tmp_path, text_encoder_lora_layers=state, text_encoder_lora_adapter_metadata=stated)
    model = base("sd15")
    read = read_adapter(tmp_path, model).text_encoders["text_encoder"]
    layers = {name: module for name, module in pipeline.text_encoder.named_modules() if hasattr(module, "lora_A")}
    assert read.keys() == layers.keys()
    for name, layer in layers.items():
        assert torch.allclose(read[name].delta(), layer.get_delta_weight("default"), atol=1e-6)


@pytest.mark.parametrize("pattern", ["to_(q|v)", "to_?", "[tq]o_v", r"to\wv", "to_v$$", "^^to_v", "to v"])
def test_other_patterns_are_refused(bases, tmp_path, pattern):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_v"], alpha_pattern={pattern: 3})
    get_peft_model(tiny.backbone("sd15"), config).save_pretrained(tmp_path)
    with pytest.raises(IncompatibleModelError, match="only plain names of modules are read"):
        read_adapter(tmp_path, bases["sd15"])


def test_a_saved_adapter_of_two_ranks_is_read_as_plain_diffusers_reads_it(bases, tmp_path):
    """A file that diffusers loads and saves again holds anchored patterns, derived from its tensors."""
    one = tiny.pipeline("sd15")
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["to_k"], rank_pattern={"attn1.to_k": 2}, init_lora_weights=False
    )
    one.unet.add_adapter(config)
    one.save_lora_weights(tmp_path / "a", unet_lora_layers=get_peft_model_state_dict(one.unet))
    two = tiny.pipeline("sd15")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        two.load_lora_weights(tmp_path / "a")
        two.unet.save_lora_adapter(tmp_path / "b", adapter_name="default_0")
        three = tiny.pipeline("sd15")
        three.unet.load_lora_adapter(tmp_path / "b", prefix=None, weight_name="pytorch_lora_weights.safetensors")
        read = read_adapter(tmp_path / "b", bases["sd15"])
    layers = {name: module for name, module in three.unet.named_modules() if hasattr(module, "lora_A")}
    assert {change.rank for change in read.modules.values()} == {2, 4}
    for name, layer in layers.items():
        assert torch.allclose(read.modules[name].delta(), layer.get_delta_weight("default_0"), atol=1e-6)


def test_what_we_write_for_comfyui_users_is_read_back(bases, tmp_path):
    adapter = adapter_of(bases["sdxl"])
    path = write_adapter(adapter, tmp_path / "a.safetensors", base=bases["sdxl"])
    for component, module, one in read_adapter(path, bases["sdxl"]):
        original = adapter.components[component][module]
        assert original.relative_error(one) < 1e-6


@pytest.mark.parametrize("names", [("v_pred",), ("v_pred", "ztsnr")])
def test_markers_of_the_base_are_told_and_change_nothing(bases, tmp_path, names):
    adapter = adapter_of(bases["sd15"])
    plain = written(adapter, tmp_path / "a.safetensors", under("lora_unet_", "lora_te_", flat=True), UP_DOWN)
    save_file(load_file(plain) | {name: torch.empty(0) for name in names}, tmp_path / "marked.safetensors")
    with pytest.warns(UserWarning, match=f"the same marker: it holds {' and '.join(names)}"):
        marked = read_adapter(tmp_path / "marked.safetensors", bases["sd15"])
    assert [change.alpha for *_, change in marked] == [change.alpha for *_, change in adapter]
    assert all(torch.equal(one.down, other.down) for (*_, one), (*_, other) in zip(marked, adapter, strict=True))


def test_a_factor_without_rows_is_none(bases, tmp_path):
    empty = {
        "lora_unet_conv_in.lora_down.weight": torch.ones(0, 4, 3, 3),
        "lora_unet_conv_in.lora_up.weight": torch.ones(32, 0, 1, 1),
    }
    save_file(empty, tmp_path / "a.safetensors")
    with pytest.raises(IncompatibleModelError, match="of shape 0x4x3x3, which is no factor of a LoRA"):
        read_adapter(tmp_path / "a.safetensors", bases["sd15"])


@pytest.mark.parametrize(
    "settings",
    [{"lora_alpha": 8}, {"lora_alpha": 8, "use_rslora": True}, {"lora_alpha": 4, "alpha_pattern": {"q_proj": 2}}],
)
def test_a_peft_folder_of_a_text_encoder_changes_it(bases, tmp_path, settings):
    encoder = tiny.pipeline("sd15").text_encoder
    theirs = get_peft_model(encoder, LoraConfig(r=4, target_modules=["q_proj", "fc1"], **settings))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    theirs.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path, bases["sd15"])
    assert not adapter.modules
    found = fuse(tiny.pipeline("sd15").text_encoder, adapter.text_encoders["text_encoder"]).state_dict()
    for name, tensor in theirs.merge_and_unload().state_dict().items():
        torch.testing.assert_close(found[name], tensor)
    with pytest.raises(IncompatibleModelError, match="holds nothing that fits"):  # either encoder may be meant
        read_adapter(tmp_path, bases["sdxl"])
