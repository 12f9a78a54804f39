"""What we rely on in libraries, and what we guard against in them: a failure here says "the library changed".

Nothing of ours is tested. Where a guard falls because a library became safer or stricter, the wall of ours that stands
before it can be looked at again; where a name or a default fell, our code must follow.
"""

import csv
import inspect
import io
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata

import numpy as np
import pytest
import torch
from torch import nn


@contextmanager
def library(name: str) -> Iterator[None]:
    """Says who changed."""
    try:
        yield
    except (AssertionError, AttributeError, ImportError, TypeError, KeyError) as error:
        pytest.fail(f"{name} {metadata.version(name)} changed, we did not break: {error or type(error).__name__}")


# --- diffusers --------------------------------------------------------------------------------------------------------


def test_upstream_diffusers_has_the_classes_we_name():
    import diffusers

    from diffcore.checkpoint.catalog import BACKBONES, PIPELINES, SCHEDULERS

    with library("diffusers"):
        # By name: importing every pipeline takes half a minute.
        assert {*BACKBONES, *SCHEDULERS, *PIPELINES, "AutoencoderKL"} - set(dir(diffusers)) == set()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("UNet2DModel", "sample timestep class_labels"),
        ("UNet2DConditionModel", "sample timestep encoder_hidden_states added_cond_kwargs encoder_attention_mask"),
        ("DiTTransformer2DModel", "hidden_states timestep class_labels"),
        (
            "PixArtTransformer2DModel",
            "hidden_states encoder_hidden_states timestep added_cond_kwargs encoder_attention_mask",
        ),
        ("SD3Transformer2DModel", "hidden_states encoder_hidden_states pooled_projections timestep"),
        (
            "FluxTransformer2DModel",
            "hidden_states encoder_hidden_states pooled_projections timestep img_ids txt_ids guidance",
        ),
    ],
)
def test_upstream_diffusers_backbones_take_the_arguments_we_pass(name, arguments):
    import diffusers

    with library("diffusers"):
        taken = inspect.signature(getattr(diffusers, name).forward).parameters
        assert [argument for argument in (*arguments.split(), "return_dict") if argument not in taken] == []


def test_upstream_diffusers_schedulers_keep_their_defaults():
    from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler

    with library("diffusers"):
        ours = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "steps_offset": 0}
        ours |= {"num_train_timesteps": 1000, "prediction_type": "epsilon", "set_alpha_to_one": True}
        found = DDIMScheduler().config
        assert {key: found[key] for key in ours} == ours
        assert "rescale_betas_zero_snr" not in PNDMScheduler().config  # read from files, not from the class
        edm = EDMEulerScheduler()
        edm.set_timesteps(5)
        assert float(edm.timesteps[0]) == pytest.approx(1.0955, abs=1e-4)  # c_noise = ln(80) / 4
        assert float(edm.init_noise_sigma) == pytest.approx(80.00625, abs=1e-4)
        flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
        flow.set_timesteps(28)
        assert flow.timesteps[:2].tolist() == pytest.approx([1000.0, 987.4], abs=0.1)
        assert float(flow.sigmas[-1]) == 0


def test_upstream_diffusers_takes_whatever_it_does_not_know_for_sd1():
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    with library("diffusers"):
        assert infer_diffusers_model_type({"no such key": torch.zeros(1)}) == "v1"


def test_upstream_diffusers_loads_a_model_that_lacks_a_tensor(tmp_path):
    from diffusers import DiTTransformer2DModel
    from safetensors.torch import load_file, save_file

    from diffcore.testing import tiny

    tiny.backbone("dit").save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    lost = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, file)
    with library("diffusers"):
        model = DiTTransformer2DModel.from_pretrained(tmp_path, local_files_only=True)
        assert dict(model.named_parameters())[lost].is_meta


def test_upstream_diffusers_attention_goes_through_torchs_function(monkeypatch):
    from diffcore.testing import tiny

    calls = []
    fused = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k)
    )
    for name in ("dit", "flux"):
        network, (x_t, t, cond) = tiny.denoiser(name), tiny.inputs(name)
        with torch.no_grad():
            network(x_t, t, cond)
        with library("diffusers"):
            modules = [m for m in network.modules() if type(m).__name__ in ("Attention", "FluxAttention")]
            assert len(calls) == len(modules) > 0
        calls.clear()


def test_upstream_diffusers_fused_projections_silence_to_k():
    from diffcore.testing import tiny

    network, (x_t, t, cond) = tiny.denoiser("sd15"), tiny.inputs("sd15")
    fired = []
    for name, module in network.named_modules():
        if name.endswith("attn2.to_k"):
            module.register_forward_hook(lambda *_: fired.append(1))
    with library("diffusers"), torch.no_grad():
        network(x_t, t, cond)
        assert fired
        fired.clear()
        network.backbone.fuse_qkv_projections()
        network(x_t, t, cond)
        assert not fired
        assert any(getattr(module, "fused_projections", False) for module in network.modules())


# --- transformers -----------------------------------------------------------------------------------------------------


def test_upstream_transformers_clip_keeps_its_names():
    from diffcore.testing import tiny

    encoder = tiny.text_encoder()
    with library("transformers"):
        names = {name for name, _ in encoder.named_parameters()}
        assert "encoder.layers.0.self_attn.k_proj.weight" in names  # 4.x had text_model. before it
        output = encoder(torch.tensor([[512, 5, 513]]), output_hidden_states=True)
        assert output[0].shape == (1, 3, 32)
        assert output.pooler_output.shape == (1, 32)
        assert len(output.hidden_states) == 3
        projected = tiny.text_encoder(projection=True)(torch.tensor([[512, 5, 513]]))
        assert projected[0].shape == (1, 32)  # text_embeds come first


def test_upstream_transformers_has_what_features_are_read_from():
    import transformers

    with library("transformers"):
        for name in ("CLIPModel", "Dinov2Model", "Dinov2WithRegistersModel", "DINOv3ViTModel", "ViTModel"):
            assert hasattr(transformers, name), name
        small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        config = transformers.CLIPConfig(
            text_config={**small, "vocab_size": 9}, vision_config={**small, "image_size": 8, "patch_size": 8}
        )
        model = transformers.CLIPModel(config)
        for part in ("text_model", "vision_model", "text_projection", "visual_projection"):
            assert isinstance(getattr(model, part), nn.Module), part


def test_upstream_transformers_tokenizers_are_built_from_entries():
    from diffcore.testing import tiny

    with library("transformers"):
        clip, t5 = tiny.tokenizer(), tiny.t5_tokenizer()
        assert (len(clip), clip.model_max_length, clip.pad_token_id) == (514, 77, 513)
        assert clip("a").input_ids == [512, clip.convert_tokens_to_ids("a</w>"), 513]
        assert t5("a").input_ids[-1] == t5.eos_token_id == 1


def test_upstream_transformers_loads_a_model_that_lacks_a_tensor(tmp_path):
    import transformers
    from safetensors.torch import load_file, save_file

    from diffcore.testing import tiny

    tiny.text_encoder().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = sorted(name for name in tensors if name.endswith("weight"))[0]
    save_file({n: t for n, t in tensors.items() if n != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with library("transformers"):
        model, info = transformers.CLIPTextModel.from_pretrained(
            tmp_path, local_files_only=True, output_loading_info=True
        )
        assert len(info["missing_keys"]) == 1
        assert not any(parameter.is_meta for parameter in model.parameters())  # filled with random numbers


# --- torchmetrics, lightning, clean-fid -------------------------------------------------------------------------------


def test_upstream_torchmetrics_keeps_states_apart_and_in_float64():
    from torchmetrics import Metric
    from torchmetrics.utilities.data import dim_zero_cat
    from torchmetrics.utilities.distributed import gather_all_tensors

    class Total(Metric):
        def __init__(self):
            super().__init__()
            self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx=None)

        def update(self, x):
            self.total = self.total + x

        def compute(self):
            return self.total

    with library("torchmetrics"):
        assert nn.ModuleList([Total()]).half()[0].total.dtype == torch.float64
        assert "dist_sync_fn" in inspect.signature(Metric.__init__).parameters or "dist_sync_fn" in inspect.getsource(
            Metric.__init__
        )
        assert dim_zero_cat([torch.ones(1), torch.ones(2)]).shape == (3,)
        assert list(inspect.signature(gather_all_tensors).parameters) == ["result", "group"]


def test_upstream_torchmetrics_ssim_is_the_one_ours_follows():
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    with library("torchmetrics"):
        options = {name: p.default for name, p in inspect.signature(ssim).parameters.items()}
        wanted = {"gaussian_kernel": True, "sigma": 1.5, "kernel_size": 11, "data_range": None, "k1": 0.01, "k2": 0.03}
        assert {name: options[name] for name in wanted} == wanted
        flat = torch.full((1, 1, 16, 16), 0.5)
        assert torch.isnan(ssim(flat, flat))  # of constant images without a range: ours asks for one
        assert float(torch.as_tensor(ssim(flat, flat, data_range=1.0))) == pytest.approx(1)


def test_upstream_torchmetrics_mean_iou_is_a_mean_over_images():
    from torchmetrics.segmentation import MeanIoU

    labels = torch.tensor([[[0, 0, 0, 0]], [[1, 1, 1, 0]]])
    found = torch.tensor([[[0, 0, 0, 1]], [[1, 1, 1, 0]]])
    metric = MeanIoU(num_classes=2, input_format="index")
    metric.update(found, labels)
    with library("torchmetrics"):
        # over the data set: class 0 is 4 of 5, class 1 is 3 of 4
        assert abs(float(metric.compute()) - (4 / 5 + 3 / 4) / 2) > 0.05


def test_upstream_lightning_has_what_training_is_built_on():
    import lightning as L
    from lightning.fabric import Fabric
    from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
    from lightning.pytorch.utilities import rank_zero_only
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    with library("lightning"):
        assert issubclass(SIGTERMException, SystemExit)
        assert callable(rank_zero_only)
        assert callable(rank_zero_experiment)
        assert inspect.isabstract(Logger)
        for name in ("launch", "all_gather", "barrier", "setup_module", "global_rank"):
            assert hasattr(Fabric, name), name
        for name in ("configure_optimizers", "training_step", "on_save_checkpoint", "on_load_checkpoint"):
            assert hasattr(L.LightningModule, name), name


def test_upstream_clean_fid_resizes_without_torchvision():
    with library("clean-fid"):
        from cleanfid.resize import build_resizer

        picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        resized = build_resizer("clean")(picture)
        assert resized.shape == (299, 299, 3)
        assert resized.dtype == np.float32


# --- files: safetensors, Pillow, torch --------------------------------------------------------------------------------


def test_upstream_safetensors_saves_as_our_writer_must_make_up_for(tmp_path):
    from safetensors.torch import save_file

    file = tmp_path / "x.safetensors"
    shared = torch.zeros(4)
    with library("safetensors"):
        save_file({"x": shared}, file)
        assert file.stat().st_mode & 0o077 == 0  # whatever the umask says
        with pytest.raises(RuntimeError):
            save_file({"x": shared, "y": shared}, file)
        with pytest.raises(ValueError, match="contiguous"):
            save_file({"x": torch.zeros(2, 3).T}, file)
        with pytest.raises(TypeError):
            save_file({"x": shared}, file, metadata={"n": 1})  # pyright: ignore[reportArgumentType]


def test_upstream_safetensors_takes_names_that_we_refuse():
    from safetensors.torch import load, save

    with library("safetensors"):
        for name in ("", "a\0b", "../up", "\x1b[31m", "x" * 100_000):
            assert name in load(save({name: torch.zeros(1)}))


def test_upstream_pillow_clips_sixteen_bits_and_turns_only_when_asked():
    from PIL import Image, ImageOps

    with library("pillow"):
        assert Image.MAX_IMAGE_PIXELS == 89_478_485
        deep = Image.fromarray(np.full((2, 2), 31_000, dtype=np.uint16))
        assert np.asarray(deep.convert("L")).max() == 255  # 31 000 / 257 is 121
        picture, data = Image.new("RGB", (4, 2)), io.BytesIO()
        exif = picture.getexif()
        exif[0x0112] = 6
        picture.save(data, "JPEG", exif=exif)
        again = Image.open(data)
        assert again.size == (4, 2)
        assert ImageOps.exif_transpose(again).size == (2, 4)


def test_upstream_torch_decides_on_nan_without_a_word():
    x = torch.tensor([1.0, torch.nan, 2.0])
    with library("torch"):
        assert int(x.argmax()) == 1
        assert int(x.argsort()[-1]) == 1
        assert not bool(x[1] > 0)


def test_upstream_torch_draws_rows_of_sixteen_alike():
    with library("torch"):
        for width in (16, 32, 48, 4096):
            two, one = (torch.randn(rows, width, generator=torch.Generator().manual_seed(3)) for rows in (2, 1))
            assert torch.equal(two[0], one[0])


def test_upstream_torch_resizes_with_aliasing_unless_told():
    picture = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with library("torch"):
        plain, smooth = (
            nn.functional.interpolate(picture, (16, 16), mode="bicubic", antialias=antialias)
            for antialias in (False, True)
        )
        assert float(plain.std()) > 2 * float(smooth.std())


def test_upstream_torch_loads_a_tensor_larger_than_its_bytes(tmp_path):
    torch.save(torch.zeros(1).expand(10, 10), tmp_path / "x.pt")
    with library("torch"):
        found = torch.load(tmp_path / "x.pt", weights_only=True, map_location="cpu")
        assert found.shape == (10, 10)
        assert found.untyped_storage().nbytes() == 4  # whoever makes it contiguous asks for more


# --- text: Python, jinja2, rich, yaml ---------------------------------------------------------------------------------


def test_upstream_python_reads_json_too_kindly():
    with library("diffcore"):  # the standard library has no distribution of its own
        assert json.loads('{"a": 1, "a": 2}') == {"a": 2}
        assert json.loads("NaN") != json.loads("NaN")
        assert json.loads("1e999") == float("inf")
        assert json.dumps(float("nan")) == "NaN"


def test_upstream_python_breaks_captions_and_hides_climbing_members(tmp_path):
    text, table = "one\u2028two\x85three\x0bfour", io.StringIO()
    csv.writer(table).writerow(["=1+1"])
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("../../up.txt", "x")
    with zipfile.ZipFile(tmp_path / "x.zip") as archive:
        taken = archive.extract("../../up.txt", tmp_path / "out")
    with library("diffcore"):
        assert len(text.splitlines()) == 4
        assert table.getvalue().startswith("=1+1")
        assert taken == str(tmp_path / "out" / "up.txt")


def test_upstream_jinja2_escapes_only_when_told():
    from jinja2 import Environment, select_autoescape

    with library("jinja2"):
        assert Environment().autoescape is False
        assert select_autoescape()("template.html.j2") is False
        assert "&lt;b&gt;" in Environment(autoescape=True).from_string("{{ x }}").render(x="<b>")


def test_upstream_rich_takes_prompts_for_markup():
    from rich.console import Console
    from rich.errors import MarkupError
    from rich.text import Text

    console = Console(file=io.StringIO(), force_terminal=True)
    with library("rich"), pytest.raises(MarkupError):
        console.print("[/foo]")
    console.print(Text("a\x1b[31mb"))
    with library("rich"):
        assert "\x1b[31m" in console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_upstream_yaml_takes_a_key_twice():
    import yaml

    with library("pyyaml"):
        assert yaml.safe_load("a: 1\na: 2") == {"a": 2}
