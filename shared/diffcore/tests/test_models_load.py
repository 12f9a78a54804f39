"""Loading: the same weights by folder, variant, shards and single file; damage, adapters and absences told."""

import json
import re
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer, T5Tokenizer

from diffcore.checkpoint import inspect_model
from diffcore.checkpoint.tokenizers import byte_letters, installed_clip_tokenizer
from diffcore.errors import IncompatibleModelError, ModelNotFoundError, UserError
from diffcore.models import load, resolve
from diffcore.runtime import Runtime
from diffcore.testing import tiny
from diffcore.testing.checkpoints import DAMAGES, corrupt, sharded, single_file
from diffcore.testing.malformed.places import foreign_layouts

CPU = Runtime(device="cpu")
WEIGHTS = "diffusion_pytorch_model"


def same(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(p.requires_grad for p in ours.parameters())
    assert not ours.training


@pytest.fixture(scope="module")
def pipeline():
    return tiny.pipeline("sd15")


@pytest.fixture(scope="module")
def saved(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "sd15"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "sd15")


@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_backbone_folder_gives_equal_weights_and_outputs(tmp_path, name):
    backbone = tiny.backbone(name)
    backbone.save_pretrained(tmp_path / "whole")
    if name == "unet2d":
        (tmp_path / "whole" / "denoiser.json").write_text('{"prediction_type": "edm"}')
    shutil.copytree(tmp_path / "whole", tmp_path / "shards")
    sharded(tmp_path / "shards", WEIGHTS, 3)
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    (tmp_path / "half" / f"{WEIGHTS}.safetensors").unlink()
    rounded = {n: tensor.half() for n, tensor in backbone.state_dict().items()}
    save_file(rounded, tmp_path / "half" / f"{WEIGHTS}.fp16.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = [load(tmp_path / kind, CPU) for kind in ("whole", "shards")]
        half = load(tmp_path / "half", CPU).backbone.state_dict()
    assert half.keys() == rounded.keys()
    assert all(torch.equal(half[n], tensor.float()) for n, tensor in rounded.items())
    x_t, t, cond = tiny.inputs(name)
    expected = tiny.denoiser(name)(x_t, t, cond).output
    for model in models:
        same(model.backbone, backbone)
        assert torch.equal(model.denoiser(x_t, t, cond).output, expected)
        assert model.name in ("whole", "shards")


def test_a_pipeline_folder_gives_equal_weights(saved, pipeline):
    model = load(saved, CPU)
    for part in ("unet", "vae", "text_encoder"):
        same(model.modules[part], getattr(pipeline, part))
    assert model.pipeline_class == "StableDiffusionPipeline"


def test_half_precision_variants_are_found_and_equal(pipeline, tmp_path):
    half = {name: tensor.half() for name, tensor in pipeline.unet.state_dict().items()}
    pipeline.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "unet" / f"{WEIGHTS}.safetensors").unlink()
    save_file(half, tmp_path / "m" / "unet" / f"{WEIGHTS}.fp16.safetensors")
    model = load(tmp_path / "m", CPU)  # the text encoder stays plain: mixed folders are common
    loaded = model.backbone.state_dict()
    assert all(torch.equal(loaded[name], tensor.float()) for name, tensor in half.items())
    assert model.components["unet"].variant == "fp16"
    pipeline.unet.save_pretrained(tmp_path / "m" / "unet")
    same(load(tmp_path / "m", CPU).backbone, pipeline.unet)  # the most exact variant wins


def test_sharded_variants_are_found(pipeline, tmp_path):
    pipeline.unet.save_pretrained(tmp_path, variant="fp16", max_shard_size="1MB")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert any("index.fp16.json" in name for name in names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load(tmp_path, CPU)
    same(model.backbone, pipeline.unet)
    assert len(model.components["backbone"].weights) > 1


def test_bfloat16_is_the_weights_rounded(saved, pipeline):
    model = load(saved, Runtime(device="cpu", dtype="bfloat16"))
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, pipeline.unet.state_dict()[name].bfloat16())
    cond = model.prompts(["a cat"])
    prediction = model.denoiser(torch.ones(1, 4, 8, 8), torch.tensor([500]), cond)
    assert prediction.x0.dtype == torch.float32
    assert prediction.x0.isfinite().all()


def test_loaded_weights_do_not_depend_on_the_file_any_more(folder, pipeline):
    model = load(folder, CPU)
    path = folder / "unet" / f"{WEIGHTS}.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    same(model.backbone, pipeline.unet)


@pytest.mark.parametrize(("name", "width"), [("sd15", 768), ("sd21", 1024), ("sdxl", 32)])
def test_single_files_give_equal_weights_also_in_the_library(tmp_path, name, width):
    import diffusers

    pipeline = tiny.pipeline(name, width=width)
    pipeline.save_pretrained(tmp_path / "like")
    file = single_file(pipeline, tmp_path / "model.safetensors", name)
    model = load(file, CPU, like=tmp_path / "like")
    published = single_file(pipeline, tmp_path / "published.safetensors", name, extra=True)
    with_leftovers = load(published, CPU, like=tmp_path / "like")
    kind = diffusers.StableDiffusionXLPipeline if name == "sdxl" else diffusers.StableDiffusionPipeline
    theirs = kind.from_single_file(str(file), config=str(tmp_path / "like"), local_files_only=True)
    parts = [part for part in model.modules if not part.startswith("tokenizer")]
    assert len(parts) == (4 if name == "sdxl" else 3)
    for part in parts:
        same(model.modules[part], getattr(pipeline, part))
        same(with_leftovers.modules[part], getattr(pipeline, part))
        reread = getattr(theirs, part).state_dict()
        assert all(torch.equal(reread[n], t) for n, t in model.modules[part].state_dict().items())
    assert model.denoiser.prediction_type == ("v_prediction" if name == "sd21" else "epsilon")
    condition = load(tmp_path / "like", CPU).prompts(["a cat"])
    for key, value in model.prompts(["a cat"]).items():
        assert torch.equal(value, condition[key])


def test_a_backbone_alone_in_a_file(tmp_path):
    pipeline = tiny.pipeline("sd15", width=768)
    pipeline.save_pretrained(tmp_path / "like")
    whole = load_file(single_file(pipeline, tmp_path / "x.safetensors", "sd15"))
    prefix = "model.diffusion_model."
    bare = {name.removeprefix(prefix): tensor for name, tensor in whole.items() if name.startswith(prefix)}
    save_file(bare, tmp_path / "bare.safetensors")
    with pytest.warns(UserWarning, match="text_encoder or its tokenizer is not there"):
        model = load(tmp_path / "bare.safetensors", CPU, like=tmp_path / "like")
    same(model.backbone, pipeline.unet)
    assert model.prompts is None
    with pytest.raises(IncompatibleModelError, match="bare came without an autoencoder; load the pipeline folder"):
        model.codec.decode(torch.ones(1, 4, 8, 8))


def test_single_files_say_what_they_predict(tmp_path):
    pipeline = tiny.pipeline("sd15", width=768)
    pipeline.save_pretrained(tmp_path / "like")
    file = single_file(pipeline, tmp_path / "m.safetensors", "sd15")
    options = {"like": tmp_path / "like"}
    assert load(file, CPU, **options).denoiser.prediction_type == "epsilon"
    (tmp_path / "m.yaml").write_text('model:\n  params:\n    parameterization: "v"\n')
    assert load(file, CPU, **options).denoiser.prediction_type == "v_prediction"
    assert load(file, CPU, prediction_type="sample", **options).denoiser.prediction_type == "sample"
    (tmp_path / "m.yaml").unlink()
    save_file(load_file(file) | {"v_pred": torch.ones(1), "ztsnr": torch.ones(1)}, file)
    marked = load(file, CPU, **options).denoiser
    assert marked.prediction_type == "v_prediction"
    assert marked.schedule.rescale_betas_zero_snr
    assert float(marked.schedule.alpha_sigma(marked.schedule.timesteps(3)[:1])[0]) == 0


def test_single_files_find_a_tokenizer_where_the_user_says(tmp_path, monkeypatch):
    pipeline = tiny.pipeline("sd15", width=768)
    pipeline.save_pretrained(tmp_path / "like")
    shutil.rmtree(tmp_path / "like" / "tokenizer")
    file = single_file(pipeline, tmp_path / "m.safetensors", "sd15")
    tiny.tokenizer().save_pretrained(tmp_path / "words")
    model = load(file, CPU, like=tmp_path / "like", tokenizer=tmp_path / "words")
    assert model.prompts.tokenize(["a cat"]).ids[0][0, :6].tolist() == [512, 320, 66, 64, 339, 513]
    with pytest.warns(UserWarning, match="prompts cannot be encoded"):
        assert load(file, CPU, like=tmp_path / "like").prompts is None


def test_the_vocabulary_of_an_installed_package_is_used(tmp_path, monkeypatch):
    import gzip
    import importlib.machinery
    import importlib.util

    assert installed_clip_tokenizer("!") is None or len(installed_clip_tokenizer("!")) == 49_408
    package = tmp_path / "open_clip"
    package.mkdir()
    letters = byte_letters()
    merges = ["c a", "ca t</w>", *(f"{a} {b}" for a in letters for b in letters if a + b != "ca")]
    lines = "\n".join(['"bpe_simple_vocab_16e6.txt#version: 0.2', *merges])
    (package / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress(lines.encode()))
    found = importlib.machinery.ModuleSpec("open_clip", None, is_package=True)
    found.submodule_search_locations = [str(package)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found if name == "open_clip" else None)
    tokenizer = installed_clip_tokenizer("!")
    assert len(tokenizer) == 49_408
    assert tokenizer("cat").input_ids == [49_406, 513, 49_407]  # the second merge comes after 512 letters
    assert tokenizer.pad_token_id == 0


def test_tokenizers_are_the_librarys(saved, tmp_path):
    theirs = CLIPTokenizer.from_pretrained(saved / "tokenizer", local_files_only=True)
    ours = load(saved, CPU).modules["tokenizer"]
    texts = ["A  Cat!", "naïve ☃ don't", "", "<|endoftext|> x", "x" * 300]
    for text in texts:
        assert ours(text).input_ids == theirs(text).input_ids
    # The layout of published folders: two plain files and a map of special tokens.
    old = tmp_path / "old"
    shutil.copytree(saved, old)
    for file in (old / "tokenizer").iterdir():
        file.unlink()
    vocabulary = {**tiny.tokenizer().get_vocab(), "ca": 514, "cat</w>": 515}
    (old / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
    (old / "tokenizer" / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    (old / "tokenizer" / "special_tokens_map.json").write_text('{"pad_token": {"content": "!", "lstrip": false}}')
    (old / "tokenizer" / "tokenizer_config.json").write_text('{"model_max_length": 77}')
    config = json.loads((old / "text_encoder" / "config.json").read_text())
    (old / "text_encoder" / "config.json").write_text(json.dumps(config | {"vocab_size": 516}))
    weights = load_file(old / "text_encoder" / "model.safetensors")
    name = next(n for n in weights if "token_embedding" in n)
    weights[name] = torch.cat([weights[name], weights[name][:2]])
    save_file(weights, old / "text_encoder" / "model.safetensors")
    tokens = load(old, CPU).prompts.tokenize(["cat"]).ids[0][0]
    assert tokens[:4].tolist() == [512, 515, 513, 0]


def test_unigram_vocabularies_are_the_librarys_from_both_kinds_of_file(tmp_path):
    from diffcore.checkpoint.component import read_component
    from diffcore.checkpoint.tokenizers import build_tokenizer

    tiny.t5_tokenizer().save_pretrained(tmp_path)
    theirs = T5Tokenizer.from_pretrained(tmp_path, local_files_only=True)
    texts = ["a cat on a mat", "  x  y ", "", "q" * 40]

    def ours():
        sizes = {file.name: file.stat().st_size for file in tmp_path.iterdir()}
        return build_tokenizer(read_component(tmp_path, sizes, "tokenizer", "transformers", "T5TokenizerFast"))

    assert [ours()(text).input_ids for text in texts] == [theirs(text).input_ids for text in texts]
    pieces = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "spiece.model").write_bytes(spiece(pieces[:-100]))  # published files hold no sentinels
    assert [ours()(text).input_ids for text in texts] == [theirs(text).input_ids for text in texts]
    assert len(ours()) == len(theirs)
    (tmp_path / "spiece.model").write_bytes(spiece(pieces)[:-3])
    with pytest.raises(IncompatibleModelError, match=r"spiece\.model is no SentencePiece vocabulary, or is truncated"):
        ours()


def spiece(pieces: list) -> bytes:
    """A vocabulary as a protocol buffer: field 1 repeats (1: text, 2: score)."""
    import struct

    data = b""
    for text, score in pieces:
        body = b"\x0a" + bytes([len(text.encode())]) + text.encode() + b"\x15" + struct.pack("<f", score)
        data += b"\x0a" + bytes([len(body)]) + body
    return data


def test_old_names_of_tensors_are_understood(folder, pipeline):
    vae = folder / "vae" / f"{WEIGHTS}.safetensors"
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    renamed = load_file(vae)
    for new, before in old.items():
        renamed = {name.replace(new, before): tensor for name, tensor in renamed.items()}
    assert any(".proj_attn." in name for name in renamed)
    save_file(renamed, vae)
    text = folder / "text_encoder" / "model.safetensors"
    before = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(text).items()}
    before["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(before, text)
    model = load(folder, CPU)
    same(model.modules["vae"], pipeline.vae)
    same(model.modules["text_encoder"], pipeline.text_encoder)


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_is_told(folder, how):
    corrupt(folder, how)
    expected = {
        "shard missing": r"names shards that are not there: .*00001-of-00003.*, .*00003-of-00003",
        "truncated": r"ends after [\d,]+ of [\d,]+ bytes; copy it again",
        "LFS pointer": "is a Git-LFS pointer, the file itself is missing; run git lfs pull",
        "tensor missing": r"unet in .* lacks 1 tensors \(conv_in.weight\)",
        "tensor extra": r"unet in .* has 1 tensors \(conv_in.extra\) too many",
        "tensor of another shape": r"'conv_in.bias' of shape \[31\], where UNet2DConditionModel needs \[32\]",
        "tensor of integers": "'conv_in.bias' of another kind of number",
        "NaN": "has numbers in 'conv_in.bias' that are not finite",
        "wrong class": "is of class 'AutoencoderKL', where 'UNet2DConditionModel' is expected",
        "unknown pipeline": "is of class UnknownPipeline, which is not supported; supported: StableDiffusionPipeline",
        "pickle only": r"\.bin is a pickle, which can run code when read; convert it to safetensors",
        "code": r"contains Python code \(unet/my_unet.py\); diffcore never runs code from model folders",
        "auto_map": "sets auto_map; diffcore never runs code",
        "tokenizer without vocabulary": r"has no vocabulary \(tokenizer.json or vocab.json \+ merges.txt\)",
        "no weights": "holds no diffusion_pytorch_model.safetensors",
        "no backbone": "unet is missing",
        "no configuration": "config.json is missing",
        "header beyond the file": "is not a safetensors file",
    }
    with pytest.raises(UserError, match=expected[how]):
        load(folder, CPU)


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("LoRA of kohya", "model.safetensors is an adapter; load its base model and add it with `adapter`"),
        ("LoRA of diffusers", "model.safetensors is an adapter; load its base model and add it with `adapter`"),
        ("SDXL refiner", "model.safetensors is an SDXL refiner; load the SDXL base model"),
        ("SD3", "model.safetensors is a single file of SD3; load its diffusers folder"),
        ("Flux", "model.safetensors is a single file of Flux; load its diffusers folder"),
        ("diffusers' names", "model.safetensors has diffusers' names but no config.json; put it into the folder"),
        ("unknown", "model.safetensors matches no known layout; first keys: x, y; point to an SD 1.x, 2.x or SDXL"),
        ("nine input channels", "model.safetensors takes 9 input channels: an inpainting model; models of 4 channels"),
    ],
)
def test_files_that_are_no_model_are_called_what_they_are(tmp_path, named, told):
    shapes = {"model.diffusion_model.input_blocks.0.0.weight": (8, 9, 3, 3)}
    shapes = foreign_layouts().get(named, shapes)
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    with pytest.raises(IncompatibleModelError, match=re.escape(told)):
        load(tmp_path / "model.safetensors", CPU)


def test_finiteness_may_be_left_unchecked(folder):
    corrupt(folder, "NaN")
    assert load(folder, CPU, check_finite=False).backbone.conv_in.bias.isnan().sum() == 1


def test_parts_that_a_model_can_do_without(folder):
    for part in ("vae", "text_encoder", "scheduler"):
        shutil.rmtree(folder / part)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load(folder, CPU)
    told = " ".join(str(warning.message) for warning in caught)
    assert "no scheduler came with the model" in told
    assert "text_encoder or its tokenizer is not there" in told
    assert model.prompts is None
    with pytest.raises(IncompatibleModelError, match="sd15 came without an autoencoder"):
        model.codec.encode(torch.ones(1, 3, 16, 16))


def test_trusted_pickles_are_read_without_running_them(folder, pipeline, tmp_path):
    corrupt(folder, "pickle only")
    same(load(folder, CPU, allow_pickle=True).backbone, pipeline.unet)
    wide = tiny.pipeline("sd15", width=768)
    wide.save_pretrained(tmp_path / "like")
    tensors = load_file(single_file(wide, tmp_path / "m.safetensors", "sd15"))
    torch.save({"state_dict": tensors, "global_step": 7}, tmp_path / "m.ckpt")
    same(load(tmp_path / "m.ckpt", CPU, allow_pickle=True, like=tmp_path / "like").backbone, wide.unet)
    with pytest.raises(IncompatibleModelError, match="or pass `allow_pickle=True`"):
        load(tmp_path / "m.ckpt", CPU)


def test_what_is_cut_of_a_prompt_is_told(saved):
    prompts = load(saved, CPU).prompts
    tokens = prompts.tokenize(["short", "word " * 40 + "gone forever", ""])
    assert tokens.truncated.tolist() == [False, True, False]
    assert tokens.lost[0] == tokens.lost[2] == ""
    assert re.sub(r"\W", "", tokens.lost[1]).endswith("goneforever")
    assert len(tokens) == 3
    assert tokens.ids[0].shape == tokens.masks[0].shape == (3, 77)
    assert tokens.ids[0][1, -1] == 513  # the end is kept
    assert prompts.tokenize([]).ids[0].shape == (0, 77)
    assert prompts([])["encoder_hidden_states"].shape == (0, 77, 32)
    with pytest.raises(TypeError, match="pass a list"):
        prompts.tokenize("a cat")


def test_fingerprints_tell_models_apart(saved, folder, tmp_path):
    original = load(saved, CPU).fingerprint
    assert load(folder, CPU).fingerprint == original  # a copy elsewhere
    weights = folder / "unet" / f"{WEIGHTS}.safetensors"
    tensors = load_file(weights)
    last = list(tensors)[-1]
    tensors[last] = tensors[last] + 1e-3  # a fine-tune: same names, same shapes
    save_file(tensors, weights)
    changed = load(folder, CPU).fingerprint
    assert changed != original
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | {"_name_or_path": "elsewhere"}))
    assert load(folder, CPU).fingerprint == changed  # notes do not count
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | {"steps_offset": 0}))
    assert load(folder, CPU).fingerprint != changed


def test_nothing_is_fetched_unless_asked_for(tmp_path, monkeypatch, saved):
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    asked = []

    class Hub:
        def model_info(self, name):
            return type("Info", (), {"sha": "0123abc"})

    def snapshot_download(name, **options):
        asked.append((name, options))
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ModelNotFoundError, match="`download=True` fetches it"):
        load("owner/name", CPU)
    assert asked == []
    assert resolve("owner/name", download=True) == saved
    assert asked == [
        ("owner/name", {"revision": "0123abc", "allow_patterns": ["*.json", "*.txt", "*.model", "*.safetensors"]})
    ]
    assert resolve(saved, download=True) == saved
    with pytest.raises(ModelNotFoundError, match="it has: portraits-sd"):
        load("zoo:portraits", CPU)


def test_dropped_settings_are_counted(folder):
    path = folder / "text_encoder" / "config.json"
    known = inspect_model(folder).components["text_encoder"].dropped
    path.write_text(json.dumps(json.loads(path.read_text()) | {"evil_setting": 1, "other": {"x": [1]}}))
    assert inspect_model(folder).components["text_encoder"].dropped == known + 2
    load(folder, CPU)


def test_modules_are_replaced_and_the_rest_is_shared(saved):
    import copy

    model = load(saved, CPU, prediction_type="v_prediction")
    assert model.backbone_name == "unet"
    assert model.pipeline.scheduler.config.prediction_type == "v_prediction"
    other = copy.deepcopy(model.backbone)
    torch.nn.init.zeros_(other.conv_out.weight)
    edited = model.with_modules("conv_out is zero", {"unet": other})
    assert edited.backbone is other
    assert edited.denoiser.prediction_type == "v_prediction"
    assert edited.modules["vae"] is model.modules["vae"]
    assert edited.pipeline.unet is other
    assert len({model.fingerprint, edited.fingerprint, model.with_modules("x", {"unet": other}).fingerprint}) == 3
    x_t, t, cond = tiny.inputs("sd15")
    assert model.denoiser(x_t, t, cond).output.std() > 0.1
    assert edited.denoiser(x_t, t, cond).output.std() < 0.1
    with pytest.raises(KeyError, match=r"sd15 has no transformer; it has .*unet"):
        model.with_modules("x", {"transformer": other})


def test_options_that_cannot_be_are_refused_before_anything_is_built(saved):
    with pytest.raises(IncompatibleModelError, match="DiscreteSchedule; prediction type edm needs"):
        load(saved, CPU, prediction_type="edm")
    with pytest.raises(UserError, match="float16 does not run on a CPU"):
        load(saved, Runtime(dtype="float16"))


def test_the_shipped_configurations_have_real_sizes_and_sd2_warns(tmp_path):
    file = single_file(tiny.pipeline("sd21", width=1024), tmp_path / "m.safetensors", "sd21")
    with (
        pytest.warns(UserWarning, match="v_prediction is taken, `prediction_type` replaces it"),
        pytest.raises(IncompatibleModelError, match=r"unet in .*m\.safetensors lacks 5\d\d tensors"),
    ):
        load(file, CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(IncompatibleModelError, match="lacks"):
            load(file, CPU, prediction_type="epsilon")
