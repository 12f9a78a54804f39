"""Published configurations: through the gate, on the meta device at real size, and loaded with tiny weights."""

import json
import shutil
import struct
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from diffcore.checkpoint import fingerprint, inspect_model, ldm
from diffcore.checkpoint.folders import inspect_configs
from diffcore.denoiser import DiscreteSchedule, FlowSchedule
from diffcore.models import condition_keys, load
from diffcore.models.assemble import read_schedule
from diffcore.models.build import factory_of, on_meta
from diffcore.models.singlefile import CONFIGS
from diffcore.runtime import Runtime
from diffcore.testing import real_configs, tiny

REAL = Path(real_configs.__file__).parent
NAMES = ("sd14", "sd15", "sd21", "sdxl", "sd3", "flux-dev", "pixart-alpha")
NETWORKS = ("backbone", "codec", "text_encoder")
PARAMETERS = {  # published counts of the backbones, in millions
    "sd14": 860,
    "sd15": 860,
    "sd21": 866,
    "sdxl": 2567,
    "sd3": 2028,
    "flux-dev": 11_901,
    "pixart-alpha": 611,
}


def with_vocabularies(folder: Path) -> Path:
    """Adds what the published folders hold besides JSON: vocabularies, in the layout of their time."""
    index = json.loads((folder / "model_index.json").read_text())
    for name, value in index.items():
        if name.startswith("tokenizer"):
            (folder / name).mkdir(exist_ok=True)
            if value[1].startswith("T5"):
                tiny.t5_tokenizer().save_pretrained(folder.parent / f"{folder.name}-words")
                shutil.copy(folder.parent / f"{folder.name}-words" / "tokenizer.json", folder / name)
            else:
                (folder / name / "vocab.json").write_text(json.dumps(tiny.tokenizer().get_vocab()))
                (folder / name / "merges.txt").write_text("#version: 0.2\n")
    return folder


def write_hollow_weights(module: torch.nn.Module, path: Path) -> None:
    """Writes a safetensors file with the names and shapes of a module, and nothing but a hole for its data."""
    header, end = {}, 0
    for name, tensor in module.state_dict().items():
        size = tensor.numel() * 2
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


@pytest.mark.parametrize("name", NAMES)
def test_real_sizes_pass_the_gate_and_build_on_meta(tmp_path, name):
    folder = with_vocabularies(Path(shutil.copytree(REAL / name, tmp_path / name)))
    plan = inspect_configs(folder)
    modules = {n: on_meta(c, factory_of(c)) for n, c in plan.components.items() if c.role in NETWORKS}
    for part, module in modules.items():
        stem = "model" if plan.components[part].library == "transformers" else "diffusion_pytorch_model"
        write_hollow_weights(module, folder / part / f"{stem}.safetensors")
    found = inspect_model(folder)
    assert found.components.keys() == plan.components.keys()
    backbone = next(c for c in found.components.values() if c.role == "backbone")
    assert len(backbone.weights[0].tensors) == len(modules[backbone.name].state_dict())
    millions = sum(p.numel() for p in modules[backbone.name].parameters()) / 1e6
    assert millions == pytest.approx(PARAMETERS[name], abs=1)
    assert not any(key.startswith("_") for c in found.components.values() for key in c.config)
    assert "safety_checker" not in found.components
    assert len(fingerprint(found)) == 64
    kind, schedule = read_schedule(backbone.class_name, found.components["scheduler"], found.settings)
    assert kind == {"sd21": "v_prediction", "sd3": "flow_prediction", "flux-dev": "flow_prediction"}.get(
        name, "epsilon"
    )
    assert isinstance(schedule, FlowSchedule if kind == "flow_prediction" else DiscreteSchedule)
    keys = condition_keys(modules[backbone.name])
    assert ("time_ids" in keys.required) == (name == "sdxl")
    assert ("guidance" in keys.required) == (name == "flux-dev")
    assert ("resolution" in keys.required) == (name == "pixart-alpha")  # an absent setting at 1024 pixels


def test_old_schedules_are_what_the_library_makes_of_them():
    _, schedule = read_schedule("UNet2DConditionModel", inspect_configs_of("sd14").components["scheduler"], {})
    assert schedule.timesteps(50)[[0, 1, -1]].tolist() == [981, 961, 1]
    assert float(schedule.log_snr(torch.tensor(999))) == pytest.approx(-5.36, abs=0.01)
    _, schedule = read_schedule(
        "PixArtTransformer2DModel", inspect_configs_of("pixart-alpha").components["scheduler"], {}
    )
    assert schedule.timesteps(3).tolist() == [999, 666, 333]  # the clean end is a fourth place of the class
    _, schedule = read_schedule("FluxTransformer2DModel", inspect_configs_of("flux-dev").components["scheduler"], {})
    assert schedule.shift == pytest.approx(3.158, abs=1e-3)  # exp(1.15) at 4096 tokens


def inspect_configs_of(name: str):
    from diffcore.checkpoint.folders import inspect_pipeline
    from diffcore.checkpoint.walk import walk

    index = json.loads((REAL / name / "model_index.json").read_text())
    sizes = {file: size for file, size in walk(REAL / name).items() if not file.startswith("tokenizer")}
    assert any(key.startswith("tokenizer") for key in index)
    return inspect_pipeline(REAL / name, sizes, config_only=True)


SHRUNK = {
    "unet": {
        "block_out_channels": [32, 64],
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "sample_size": 8,
        "attention_head_dim": 8,
    },
    "vae": {
        "block_out_channels": [32, 64],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "latent_channels": 4,
    },
    "text_encoder": {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4},
}
T5 = {
    "vocab_size": 160,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 37,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 4,
}
TRANSFORMERS = {  # folder -> part -> what is made smaller; all else stays as it was published
    "sd3": {
        "transformer": {
            "sample_size": 8,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "in_channels": 4,
            "out_channels": 4,
            "joint_attention_dim": 64,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 64,
            "pos_embed_max_size": 16,
        },
        "text_encoder_2": {**SHRUNK["text_encoder"], "vocab_size": 514, "projection_dim": 32},
        "text_encoder_3": {**T5, "d_model": 64},
    },
    "flux-dev": {
        "transformer": {
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 128,  # the lengths of the rotary parts are not among the published settings
            "num_attention_heads": 1,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 32,
        },
        "text_encoder_2": T5,
    },
    "pixart-alpha": {
        "transformer": {  # its sample size stays: by it old configurations say that the network is told the size
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 3,
            "cross_attention_dim": 24,
            "caption_channels": 32,
        },
        "text_encoder": T5,
    },
}
CROSS = {
    "cross_attention_dim": 32,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}


def fill(folder: Path, changes: dict[str, dict[str, object]]) -> None:
    """Makes the networks of a folder smaller, and gives them weights."""
    for part, values in changes.items():
        path = folder / part / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
    plan = inspect_configs(folder)
    for part, component in plan.components.items():
        if component.role in NETWORKS:
            module = tiny.seeded(factory_of(component), seed=0)
            stem = "model" if component.library == "transformers" else "diffusion_pytorch_model"
            tensors = {
                n: t for n, t in module.state_dict().items() if n != "encoder.embed_tokens.weight"
            }  # T5 shares it
            save_file(tensors, folder / part / f"{stem}.safetensors")


@pytest.mark.parametrize("name", ["sd14", "sd15", "sd21", "sdxl"])
def test_they_load_with_tiny_weights(tmp_path, name):
    folder = with_vocabularies(Path(shutil.copytree(REAL / name, tmp_path / name)))
    changes = {part: dict(values) for part, values in SHRUNK.items()}
    changes["text_encoder"]["vocab_size"] = 514
    if name == "sdxl":
        changes["text_encoder_2"] = changes["text_encoder"] | {"projection_dim": 32}
        changes["unet"] |= {
            "cross_attention_dim": 64,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2],
            "projection_class_embeddings_input_dim": 80,
            "addition_time_embed_dim": 8,
        }
    else:
        changes["unet"] |= CROSS
    fill(folder, changes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(folder, Runtime(device="cpu"))
    cond = model.prompts(["a cat"])
    assert cond["encoder_hidden_states"].shape == (1, 77, 64 if name == "sdxl" else 32)
    x0 = model.denoiser(torch.ones(1, 4, 8, 8), torch.tensor([500]), cond).x0
    images = model.codec.decode(x0)
    assert images.shape == (1, 3, 16, 16)
    assert images.isfinite().all()
    assert model.codec.scaling == (0.13025 if name == "sdxl" else 0.18215)
    theirs = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    assert theirs.pad_token_id == (0 if name == "sd21" else 513)  # "!" is the first letter of the vocabulary
    assert model.prompts.tokenize(["a"]).ids[0][0, -1] == theirs.pad_token_id
    assert model.pipeline is not None


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_load_with_tiny_weights(tmp_path, name):
    folder = with_vocabularies(Path(shutil.copytree(REAL / name, tmp_path / name)))
    clip = {**SHRUNK["text_encoder"], "vocab_size": 514, "projection_dim": 32}
    fill(folder, {"vae": SHRUNK["vae"], "text_encoder": clip} | TRANSFORMERS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(folder, Runtime(device="cpu"))
    cond = model.prompts(["a cat"])
    tokens, width = {"sd3": (77 + 256, 64), "flux-dev": (512, 32), "pixart-alpha": (120, 32)}[name]
    assert cond["encoder_hidden_states"].shape == (1, tokens, width)
    missing = set(condition_keys(model.backbone).required) - cond.keys()
    assert missing == ({"resolution", "aspect_ratio"} if name == "pixart-alpha" else set())
    values = {"resolution": [[16.0, 16.0]], "aspect_ratio": [[1.0]]}
    cond |= {key: torch.tensor(values[key]) for key in missing}
    t = torch.tensor([500]) if name == "pixart-alpha" else torch.tensor([0.5])
    images = model.codec.decode(model.denoiser(torch.ones(1, 4, 8, 8), t, cond).x0)
    assert images.shape == (1, 3, 16, 16)
    assert images.isfinite().all()
    assert (model.codec.scaling, model.codec.shift) == {
        "sd3": (1.5305, 0.0609),
        "flux-dev": (0.3611, 0.1159),
        "pixart-alpha": (0.18215, 0.0),
    }[name]


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_single_file_maps_at_real_size_are_the_librarys(family):
    """The library's converters, fed our names on the meta device, give back the module's own names and shapes."""
    from diffusers.loaders import single_file_utils as theirs

    plan = inspect_configs(CONFIGS / family)
    components = {name: c for name, c in plan.components.items() if c.role in NETWORKS}
    for name, component in components.items():
        module = on_meta(component, factory_of(component))
        shapes = {n: tuple(t.shape) for n, t in module.state_dict().items()}
        stored = {}
        for own, piece in ldm.component_names(family, name, shapes.keys(), ()).items():
            shape = shapes[own]
            if piece.change.endswith("third"):
                shape = (3 * shape[0], *shape[1:])
            elif piece.change == "transpose":
                shape = shape[::-1]
            elif piece.change == "flatten":
                shape = (*shape, 1, 1)
            stored[piece.name] = torch.empty(shape, device="meta")
        if name == "unet":
            back = theirs.convert_ldm_unet_checkpoint(dict(stored), dict(component.config))
        elif name == "vae":
            back = theirs.convert_ldm_vae_checkpoint(dict(stored), dict(component.config))
        elif any("text_model." in n for n in stored):
            back = theirs.convert_ldm_clip_checkpoint(dict(stored))
        else:
            prefix = f"{ldm.root_of(family, name, ())}model."
            back = theirs.convert_open_clip_checkpoint(module, dict(stored), prefix=prefix)
        if name.startswith("text_encoder") and not any(n.startswith("text_model.") for n in shapes):
            back = {n.removeprefix("text_model."): tensor for n, tensor in back.items()}
        assert {n: tuple(tensor.shape) for n, tensor in back.items()} == shapes


KNOWN_NAMES = {  # as published files spell them; shapes of the first side
    "sd15": {
        "model.diffusion_model.input_blocks.3.0.op.weight": 320,
        "model.diffusion_model.input_blocks.11.0.out_layers.3.weight": 1280,
        "model.diffusion_model.middle_block.1.proj_in.weight": 1280,
        "model.diffusion_model.output_blocks.2.1.conv.weight": 1280,
        "model.diffusion_model.output_blocks.5.2.conv.weight": 1280,
        "model.diffusion_model.output_blocks.8.2.conv.weight": 640,
        "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight": 2560,
        "first_stage_model.decoder.up.3.upsample.conv.weight": 512,
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": 128,
        "first_stage_model.encoder.down.2.downsample.conv.bias": 512,
        "first_stage_model.decoder.mid.attn_1.proj_out.weight": 512,
        "first_stage_model.quant_conv.weight": 8,
        "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc1.weight": 3072,
    },
    "sd21": {"cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight": 3072},
    "sdxl": {
        "model.diffusion_model.output_blocks.2.2.conv.weight": 1280,
        "model.diffusion_model.output_blocks.5.2.conv.weight": 640,
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight": 1280,
        "model.diffusion_model.label_emb.0.2.weight": 1280,
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": 768,
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight": 3840,
        "conditioner.embedders.1.model.positional_embedding": 77,
        "conditioner.embedders.1.model.text_projection": 1280,
    },
}


@pytest.mark.parametrize("family", KNOWN_NAMES)
def test_names_of_the_original_layout_are_those_of_published_files(family):
    named = {}
    for name, component in inspect_configs(CONFIGS / family).components.items():
        if component.role in NETWORKS:
            tensors = on_meta(component, factory_of(component)).state_dict()
            pieces = ldm.component_names(family, name, tensors.keys(), ())
            named |= {
                piece.name: len(tensors[own]) * (3 if "third" in piece.change else 1) for own, piece in pieces.items()
            }
    assert {name: named.get(name) for name in KNOWN_NAMES[family]} == KNOWN_NAMES[family]
    if family == "sd15":
        counts = [sum(name.startswith(prefix) for name in named) for prefix in ("model.", "first_", "cond_")]
        assert counts == [686, 248, 196]


def test_shipped_configurations_are_small_and_hold_no_vocabulary():
    files = [path for path in CONFIGS.rglob("*") if path.is_file()]
    assert all(path.suffix == ".json" for path in files)
    assert sum(path.stat().st_size for path in files) < 60_000
    for family in ("sd15", "sd21", "sdxl"):
        shipped, published = inspect_configs(CONFIGS / family).components, inspect_configs_of(family).components
        for name in ("unet", "vae", "text_encoder"):
            ours, theirs = shipped[name].config, published[name].config
            assert len(ours.keys() & theirs.keys()) >= 10
            assert {key: ours[key] for key in ours if key in theirs} == {
                key: theirs[key] for key in theirs if key in ours
            }
