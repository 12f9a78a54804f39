"""Copy detection: SSCD from ONNX files, and noise told apart from copies."""

import sys

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn
from torch.nn import functional

from diffcore import Runtime
from diffcore.errors import IncompatibleModelError, MissingDependencyError
from diffcore.metrics import compare_features, feature_extractor
from diffcore.metrics.compare import Measure
from diffcore.metrics.copies import looks_like_noise, noise_of, noise_pictures
from diffcore.metrics.features import FeatureExtractor
from diffcore.metrics.page import remarks
from diffcore.metrics.preprocess import SSCD

CPU = Runtime(device="cpu")


def onnx_file(path, *, kind=TensorProto.UINT8, shape=("b", "h", "w", 3), axes=(1, 2), out=("b", 3), inputs=1):
    """Writes a network whose features are the sums of each channel: they tell size and values of what it was given."""
    cast = helper.make_node("Cast", ["image"], ["values"], to=TensorProto.FLOAT)
    axes_ = helper.make_tensor("axes", TensorProto.INT64, [len(axes)], axes)
    total = helper.make_node("ReduceSum", ["values", "axes"], ["rows"], keepdims=0)
    given = [helper.make_tensor_value_info(f"image{n or ''}", kind, shape) for n in range(inputs)]
    rows = [helper.make_tensor_value_info("rows", TensorProto.FLOAT, out)]
    graph = helper.make_graph([cast, total], "sums", given, rows, [axes_])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return f"sscd:{path}"


@pytest.mark.parametrize("side", [32, 128, 300])
@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"shape": (1, "h", "w", 3)},
        {"shape": ("b", 3, "h", "w"), "axes": (2, 3)},
        {"shape": ("b", 288, 288, 3)},
    ],
    ids=["channels last", "one at a time", "channels first", "fixed size"],
)
def test_onnx_networks_of_bytes_see_enlarged_images(tmp_path, side, layout):
    extractor = feature_extractor(onnx_file(tmp_path / "a.onnx", **layout), CPU)  # no --allow-pickle: it is data
    images = torch.rand(3, 3, side, side)
    unit = SSCD.__class__(SSCD.size, None, (0.0,) * 3, (1.0,) * 3, SSCD.filter)(images)
    expected = (unit * 255).round().sum((2, 3))
    torch.testing.assert_close(extractor(images), expected, rtol=1e-6, atol=0)
    assert extractor(images[:, :, :, : side // 2]).shape == (3, 3)


def test_onnx_networks_of_floats_see_what_the_torchscript_file_sees(tmp_path):
    layout = {"kind": TensorProto.FLOAT, "shape": ("b", 3, "h", "w"), "axes": (2, 3)}
    extractor = feature_extractor(onnx_file(tmp_path / "a.onnx", **layout), CPU)
    images = torch.rand(2, 3, 40, 50)
    torch.testing.assert_close(extractor(images), SSCD(images).sum((2, 3)), rtol=1e-4, atol=1)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"shape": ("b", "h", "w", 4)}, "expected one batch of images of three channels"),
        ({"shape": ("b", "h", 3), "axes": (1,), "out": ("b", 3)}, "expected one batch of images"),
        ({"kind": TensorProto.INT64}, "expected one batch of images"),
        ({"inputs": 2}, "expected one batch of images"),
        ({"shape": (8, "h", "w", 3)}, "takes batches of 8 images alone"),
        ({"axes": (1,), "out": ("b", "w", 3)}, "expected a row of floats per image"),
    ],
)
def test_other_onnx_files_are_refused(tmp_path, layout, message):
    with pytest.raises(IncompatibleModelError, match=message):
        feature_extractor(onnx_file(tmp_path / "a.onnx", **layout), CPU)


def test_what_is_no_onnx_file_and_a_missing_runtime_are_named(tmp_path, monkeypatch):
    (tmp_path / "a.onnx").write_bytes(b"junk")
    with pytest.raises(IncompatibleModelError, match="is no ONNX file that onnxruntime reads"):
        feature_extractor(f"sscd:{tmp_path / 'a.onnx'}", CPU)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'diffcore\[onnx\]'"):
        feature_extractor(onnx_file(tmp_path / "b.onnx"), CPU)


class Grain(nn.Module):
    """Features that know of pictures how rough they are at each scale, and of smooth ones what they show, as SSCD."""

    def forward(self, x):
        x = x.mean(1, keepdim=True)
        x = x - x.mean((2, 3), keepdim=True)
        shown = functional.adaptive_avg_pool2d(x, 4)
        rough = [(x - functional.interpolate(functional.adaptive_avg_pool2d(x, 4), x.shape[2:])).std((1, 2, 3))]
        return torch.cat([shown.flatten(1), 4 * torch.stack(rough, 1)], 1)


def test_noise_is_told_from_pictures():
    extractor = FeatureExtractor("sscd:grain", "0", SSCD, Grain(), lambda network, x: network(x))
    noise = noise_of(extractor)
    generator = torch.Generator().manual_seed(1)
    broken = torch.rand(8, 3, 48, 48, generator=generator)
    pictures = functional.interpolate(torch.rand(8, 3, 4, 4, generator=generator).round(), (48, 48))
    assert looks_like_noise(extractor(broken), noise).all()
    assert not looks_like_noise(extractor(pictures), noise).any()
    assert noise_of(FeatureExtractor("dino:x", "0", SSCD, Grain(), lambda network, x: network(x))) is None


def test_noise_pictures_are_pictures_of_many_grains():
    pictures = noise_pictures()
    assert torch.equal(pictures, noise_pictures())
    assert 0 <= pictures.min() <= pictures.max() <= 1
    step = (pictures[..., 1:] - pictures[..., :-1]).abs().mean((1, 2, 3))
    assert step.max() > 8 * step.min()
    assert (pictures.std((1, 2, 3)) > 0.15).all()


def measures(real, fake, noise):
    return {m.metric: m for m in compare_features(real, fake, "sscd:x", noise=noise)}


def test_broken_pictures_are_no_copies_and_are_said():
    generator = torch.Generator().manual_seed(0)
    real, noise = torch.randn(40, 256, generator=generator), torch.eye(256)[:1] * 40
    fake = torch.randn(40, 256, generator=generator)
    fake[:10] = real[:10]  # copies
    fake[10:20] = noise + 0.1 * fake[10:20]
    found = measures(torch.cat([real, noise]), fake, noise)
    assert (found["share of copies"].value, found["share that looks like noise"].value) == (0.25, 0.25)
    (sentence,) = remarks(list(found.values()))
    assert "25% of the generated images look like noise" in sentence


def test_a_kernel_distance_clearly_below_zero_is_said_to_mean_copies():
    real = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    found = measures(real, real.clone(), torch.ones(1, 4))
    assert found["kernel distance"].high < 0
    assert "Images that were copied do." in remarks(list(found.values()))[0]
    unclear = Measure("x", "kernel distance", -0.1, -0.3, 0.1, 60)
    assert remarks([unclear]) == []
