import json
import math
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torch.nn import functional

from diffcore import Runtime
from diffcore.errors import IncompatibleModelError, ModelNotFoundError, UserError
from diffcore.metrics import feature_extractor, frechet_distance, read_statistics, resize
from diffcore.metrics.preprocess import INCEPTION, preprocessing_from
from diffcore.stats import covariance

CPU = Runtime(device="cpu")
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def pictures(n: int, height: int, width: int) -> torch.Tensor:
    """Eight-bit noise in [0, 1]: the hardest case for a resizer."""
    generator = torch.Generator().manual_seed(height)
    return torch.randint(0, 256, (n, 3, height, width), generator=generator) / 255


# --- resizing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (400, 512)], ids=str)
@pytest.mark.parametrize(("dtype", "levels"), [(torch.float32, 1e-2), (torch.float64, 3e-5)], ids=str)
def test_inception_preprocessing_is_clean_fids(size, dtype, levels):
    from cleanfid.resize import build_resizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of an argument that clean-fid gives
        bytes_ = (pictures(1, *size)[0] * 255).round().byte().permute(1, 2, 0).numpy()
        theirs = torch.from_numpy(build_resizer("clean")(bytes_)).permute(2, 0, 1).to(dtype)
    ours = INCEPTION((torch.from_numpy(bytes_).to(dtype) / 255).permute(2, 0, 1)[None])[0] * 128 + 128
    assert float((ours - theirs).abs().max()) < levels
    blurred = functional.interpolate(pictures(1, *size) * 255, (299, 299), mode="bicubic")[0].clamp(0, 255)
    if size == (400, 512):
        assert float((blurred - theirs).abs().max()) > 30  # what leaving antialias out would cost


def test_resizing_keeps_what_needs_no_filter():
    flat = torch.full((1, 3, 50, 40), 0.25)
    torch.testing.assert_close(resize(flat, (7, 90)), torch.full((1, 3, 7, 90), 0.25))
    images = pictures(2, 24, 24)
    torch.testing.assert_close(resize(images, (24, 24)), images)


@pytest.mark.parametrize(("height", "width"), [(20, 30), (40, 17), (16, 16)])
def test_preprocessing_is_that_of_transformers(height, width):
    from transformers import CLIPImageProcessor

    settings = {"size": {"shortest_edge": 18}, "crop_size": {"height": 14, "width": 12}, "resample": 3, **IMAGENET}
    picture = (80 + 96 * pictures(1, height, width)[0]).byte()  # far from 0 and 255, where they cut between two passes
    theirs = CLIPImageProcessor(**settings)(picture, return_tensors="pt")["pixel_values"]
    ours = preprocessing_from(settings)(picture[None] / 255)
    assert ours.shape == theirs.shape == (1, 3, 14, 12)
    assert float((ours - theirs).abs().max()) < 1.5 / 255 / 0.224  # they round to eight bits in both passes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resample": 1}, "the filter 1"),
        ({"size": {"shortest_edge": "224"}}, "a side of '224'"),
        ({"crop_size": 400}, r"crops \(400, 400\) out of \(224, 224\)"),
        ({"image_std": [0.5, 0.5, 0.0]}, "image_std of"),
        ({"image_mean": None}, "no image_mean"),
        ({"do_normalize": False}, "sets do_normalize to False"),
        ({"do_rescale": False}, "sets do_rescale to False"),
        ({"rescale_factor": 1 / 127.5}, r"a rescale_factor of 0\.0078"),
        ({"do_flip_channel_order": True}, "sets do_flip_channel_order"),
        ({"do_pad": True}, "sets do_pad"),
        ({"crop_pct": 0.875}, "sets crop_pct"),
        ({"size": {"longest_edge": 224}}, "gives the size"),
        ({"size": {"shortest_edge": 224, "longest_edge": 448}}, "gives the size"),
    ],
)
def test_preprocessing_of_other_kinds_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        preprocessing_from({"size": 224, "crop_size": 224, **IMAGENET} | change)


# --- networks ---------------------------------------------------------------------------------------------------------


class Pooled(nn.Module):
    """Stands for Inception's file: `forward` resizes once more, `layers` is the network."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 5, 8, stride=8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))

    def forward(self, x):
        return 0.0 * self.layers(x)


@pytest.fixture(scope="module")
def torchscript(tmp_path_factory):
    path = tmp_path_factory.mktemp("scripts") / "net work.pt"
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        network = Pooled()
        torch.jit.script(network).save(path)
    return path, network


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    import transformers

    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vision, text = {**small, "image_size": 32, "patch_size": 8}, {**small, "vocab_size": 99}
        made["clip"] = transformers.CLIPModel(
            transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=12)
        )
        made["dino"] = transformers.Dinov2Model(
            transformers.Dinov2Config(
                hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
            )
        )
    root = tmp_path_factory.mktemp("folders")
    for kind, model in made.items():
        model.eval().save_pretrained(root / kind)
        settings = {"size": {"shortest_edge": 40}, "crop_size": 32, "resample": 3, **IMAGENET}
        (root / kind / "preprocessor_config.json").write_text(json.dumps(settings))
    return root, made, preprocessing_from(settings)


def test_inception_features_come_from_the_layers(torchscript):
    path, network = torchscript
    extractor = feature_extractor(f"inception:{path}", CPU, allow_pickle=True)
    images = pictures(3, 40, 30)
    with torch.no_grad():
        x = (functional.interpolate(255 * images, (299, 299), mode="bicubic", antialias=True).clamp(0, 255) - 128) / 128
        expected = network.layers(x).flatten(1)
    torch.testing.assert_close(extractor(images), expected, atol=1e-5, rtol=1e-4)
    assert extractor.name == f"inception:{path}"
    assert len(extractor.sha256) == 64
    assert not any(p.requires_grad for p in extractor.parameters())


def test_copy_detection_features_see_the_whole_picture(tmp_path):
    class Sides(nn.Module):
        def forward(self, x):
            return torch.stack([x.mean((1, 2, 3)), torch.full([len(x)], float(x.shape[2])), x.amax((1, 2, 3))], dim=1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Sides()).save(tmp_path / "sscd.pt")
    extractor = feature_extractor(f"sscd:{tmp_path / 'sscd.pt'}", CPU, allow_pickle=True)
    rows = extractor(torch.full((2, 3, 20, 10), 0.5))
    assert rows[:, 1].tolist() == [576, 576]  # the shorter side is 288, nothing is cut off
    assert float(rows[0, 2]) == pytest.approx((0.5 - 0.406) / 0.225, abs=1e-5)
    expected = sum((0.5 - m) / s for m, s in zip(IMAGENET["image_mean"], IMAGENET["image_std"], strict=True)) / 3
    assert float(rows[0, 0]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["clip", "dino"])
def test_features_are_those_of_transformers(folders, kind):
    root, made, preprocessing = folders
    extractor = feature_extractor(f"{kind}:{root / kind}", CPU)
    images = pictures(3, 50, 44)
    with torch.no_grad():
        x = preprocessing(images)
        if kind == "clip":
            found = made[kind].get_image_features(x)
            expected = found if isinstance(found, torch.Tensor) else found.pooler_output
        else:
            expected = made[kind](x).pooler_output  # of DINOv2: the normalised class token
    torch.testing.assert_close(extractor(images), expected)
    assert extractor(images).shape == (3, 12 if kind == "clip" else 16)
    torch.testing.assert_close(extractor(images[1:2]), expected[1:2], atol=1e-5, rtol=1e-4)


def test_digest_is_of_the_weights(folders, tmp_path):
    import shutil

    root, made, _ = folders
    copy = tmp_path / "copy"
    shutil.copytree(root / "dino", copy)
    original = feature_extractor(f"dino:{root / 'dino'}", CPU).sha256
    assert feature_extractor(f"dino:{copy}", CPU).sha256 == original
    made["dino"].state_dict()["embeddings.cls_token"].add_(1e-3)
    made["dino"].save_pretrained(copy)
    made["dino"].state_dict()["embeddings.cls_token"].sub_(1e-3)
    assert feature_extractor(f"dino:{copy}", CPU).sha256 != original


def test_what_is_unsafe_or_incomplete_is_refused(torchscript, folders, tmp_path):
    from safetensors.torch import load_file, save_file

    path, (root, _, _) = torchscript[0], folders
    cases = [
        (f"inception:{path}", IncompatibleModelError, "is TorchScript, which is code; pass `allow_pickle=True`"),
        (f"clip:{path}", IncompatibleModelError, "is a file; point to the folder"),
        (f"clip:{root / 'dino'}", IncompatibleModelError, "is of model_type dinov2; supported here: clip"),
        (f"dino:{tmp_path / 'nowhere'}", ModelNotFoundError, "there is no"),
        ("zoo:portraits", ModelNotFoundError, "it has: portraits-sd"),
        ("resnet:x", UserError, "is no feature extractor; use inception:FILE"),
    ]
    for name, kind, message in cases:
        with pytest.raises(kind, match=message):
            feature_extractor(name, CPU)
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(IncompatibleModelError, match="is no TorchScript file"):
        feature_extractor(f"sscd:{tmp_path / 'junk.pt'}", CPU, allow_pickle=True)

    import shutil

    def damaged(name, damage):
        shutil.copytree(root / "dino", tmp_path / name)
        damage(tmp_path / name)
        with pytest.raises(IncompatibleModelError) as caught:
            feature_extractor(f"dino:{tmp_path / name}", CPU)
        return str(caught.value)

    def lose_a_tensor(folder):
        state = load_file(folder / "model.safetensors")
        state.pop("embeddings.cls_token")
        save_file(state, folder / "model.safetensors")

    def ask_for_code(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "mine.Model"}}))

    def pickled(folder):
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")

    assert "lacks 1 tensors; first: embeddings.cls_token" in damaged("tensor", lose_a_tensor)
    assert "auto_map; diffcore never runs code" in damaged("code", ask_for_code)
    assert "is a pickle" in damaged("pickle", pickled)
    assert "has neither preprocessor_config.json" in damaged(
        "plain", lambda f: (f / "preprocessor_config.json").unlink()
    )
    assert "is an adapter" in damaged("adapter", lambda f: (f / "adapter_config.json").write_text("{}"))


NESTED = {"processor_class": "CLIPProcessor", "image_processor": "here"}
FORMS = {  # file -> its content; "here" stands for the settings
    "transformers 4": {"preprocessor_config.json": "here"},
    "transformers 5": {"processor_config.json": NESTED},
    "of both": {"processor_config.json": NESTED, "preprocessor_config.json": "here"},
    "of both, one without images": {
        "processor_config.json": {"processor_class": "CLIPProcessor", "image_seq_length": 5},
        "preprocessor_config.json": "here",
    },
}


def written(folder, form, settings):
    for name in ("preprocessor_config.json", "processor_config.json"):
        (folder / name).unlink(missing_ok=True)
    for name, content in form.items():
        text = json.dumps(content).replace('"here"', json.dumps(settings))
        (folder / name).write_text(text)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("kind", ["CLIPImageProcessorPil", "BitImageProcessorPil", "ViTImageProcessorPil"])
def test_settings_for_images_are_found_where_either_transformers_writes_them(folders, tmp_path, name, kind):
    import shutil

    import transformers
    from PIL import Image
    from transformers.image_processing_base import ImageProcessingMixin

    folder = tmp_path / "model"
    shutil.copytree(folders[0] / "dino", folder)
    settings = getattr(transformers, kind)(**IMAGENET).to_dict()
    settings |= {"do_pad": None, "device": None, "size": {"longest_edge": None, **settings["size"]}}  # as 4.57 has them
    written(folder, FORMS[name], settings)
    found = feature_extractor(f"dino:{folder}", CPU).preprocessing
    read, _ = ImageProcessingMixin.get_image_processor_dict(folder, local_files_only=True)
    theirs = getattr(transformers, kind)(**{k: v for k, v in read.items() if v is not None and k != "size"})
    picture = Image.effect_noise((300, 260), 60).convert("RGB")
    ours = found(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255)
    expected = theirs(picture, return_tensors="pt").pixel_values
    assert ours.shape == expected.shape
    assert (ours - expected).abs().mean() < 0.01  # they round to 8 bits after resizing


def test_folders_that_transformers_5_saves_are_read(folders, tmp_path):
    import transformers

    from diffcore.testing import tiny

    folders[1]["clip"].save_pretrained(tmp_path)
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    transformers.CLIPProcessor(image_processor=images, tokenizer=tiny.tokenizer()).save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    assert feature_extractor(f"clip:{tmp_path}", CPU).preprocessing.crop == (32, 32)
    images.save_pretrained(tmp_path)  # as AutoImageProcessor leaves it
    assert feature_extractor(f"clip:{tmp_path}", CPU).preprocessing.size == 40


def test_two_files_that_prepare_images_otherwise_are_refused(folders, tmp_path):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(folders[0] / "dino", folder)
    settings = json.loads((folder / "preprocessor_config.json").read_text()) | {"resample": 2}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    with pytest.raises(IncompatibleModelError, match="prepares images otherwise in"):
        feature_extractor(f"dino:{folder}", CPU)


# --- reference statistics ---------------------------------------------------------------------------------------------


def clean_fid_formula(mu1, sigma1, mu2, sigma2) -> float:
    """clean-fid's distance, with SciPy's matrix root."""
    root = scipy.linalg.sqrtm(sigma1.dot(sigma2))
    difference = mu1 - mu2
    return float(difference.dot(difference) + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(root.real))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_clean_fids_statistics_are_read(tmp_path, order, dtype):
    generator = np.random.default_rng(0)
    real, fake = generator.normal(size=(400, 32)) * np.linspace(0.1, 2, 32), generator.normal(0.2, 1, size=(300, 32))
    mu, sigma = real.mean(0).astype(dtype), np.cov(real, rowvar=False).astype(dtype, order=order)
    np.savez(tmp_path / "réal stats.npz", mu=mu, sigma=sigma)
    found = read_statistics(tmp_path / "réal stats.npz")
    assert math.isnan(found.num_rows)
    ours = float(frechet_distance(found, covariance(torch.from_numpy(fake))))
    expected = clean_fid_formula(
        mu.astype(np.float64), sigma.astype(np.float64), fake.mean(0), np.cov(fake, rowvar=False)
    )
    assert ours == pytest.approx(expected, rel=1e-6)


def test_broken_statistics_are_refused(tmp_path):
    eye, path = np.eye(3), tmp_path / "stats.npz"
    cases = [
        ({"mu": np.zeros(3)}, "sigma.npy"),
        ({"mu": np.zeros(4), "sigma": eye}, "do not fit"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "do not fit"),
        ({"mu": np.full(3, np.nan), "sigma": eye}, "NaN or infinity"),
        ({"mu": np.zeros(3), "sigma": np.triu(np.ones((3, 3)))}, "not symmetric"),
        ({"mu": np.zeros(3), "sigma": eye.astype(object)}, "is of type object"),
        ({"mu": np.zeros(20_000), "sigma": eye}, "16384 columns are the limit"),
    ]
    for arrays, message in cases:
        np.savez_compressed(path, **arrays)
        with pytest.raises(IncompatibleModelError, match=message):
            read_statistics(path)
    whole = path.read_bytes()
    for cut in (0, 30, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(IncompatibleModelError, match="is no file of reference statistics"):
            read_statistics(path)
    with pytest.raises(UserError, match="cannot read"):
        read_statistics(tmp_path / "absent.npz")
