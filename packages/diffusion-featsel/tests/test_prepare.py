"""Images of any kind become the network's input: where they lie, what their key is, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffcore.errors import UserError
from diffusion_featsel.prepare import image_keys, placed, prepare

MODES = [("squash", (64, 48)), ("letterbox", (64, 48)), ("crop", (64, 48)), ("native", 64)]


def blob(height: int, width: int, x: float, y: float) -> torch.Tensor:
    """Returns a soft white spot on black."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    spot = torch.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * 6.0**2))
    return spot.expand(1, 3, height, width)


def centre_of_mass(image: torch.Tensor) -> torch.Tensor:
    weight = image.mean(0)
    weight = (weight - weight[0, 0]).clamp(min=0)
    rows, columns = torch.arange(weight.shape[0])[:, None], torch.arange(weight.shape[1])
    return torch.stack([(weight * columns).sum(), (weight * rows).sum()]) / weight.sum()


@pytest.mark.parametrize(("mode", "size"), MODES)
@pytest.mark.parametrize("sides", [(120, 200), (200, 120)])
def test_a_spot_lies_where_the_placement_says(mode, size, sides):
    x, y = sides[1] / 2 + 7.25, sides[0] / 2 - 9.5
    ready = prepare(blob(sides[0], sides[1], x, y), size, mode=mode, multiple=4)
    image = ready.images[0]
    top, left, height, width = ready.placements[0].target
    bars = torch.ones_like(image, dtype=torch.bool)
    bars[:, top : top + height, left : left + width] = False
    assert (image[bars] == 0.5).all()
    assert bool(bars.any()) == (mode == "letterbox")
    found = centre_of_mass(image[:, top : top + height, left : left + width]) + torch.tensor([left, top])
    point = torch.tensor([x, y])
    expected = ready.placements[0].to_input(point)
    assert (found - expected).abs().max() < 0.12
    torch.testing.assert_close(ready.placements[0].to_original(expected), point)


def test_sizes_of_each_mode():
    assert placed((100, 201), None, mode="native", multiple=64).size == (128, 192)
    assert placed((100, 201), 512, mode="native", multiple=64).size == (256, 512)
    assert placed((5, 400), 64, mode="native", multiple=8).size == (8, 64)
    assert placed((100, 200), 64, mode="letterbox").target == (16, 0, 32, 64)
    assert placed((100, 200), 64, mode="crop").source == (0, 50, 100, 100)
    assert placed((100, 200), (32, 64), mode="crop").source == (0, 0, 100, 200)
    with pytest.raises(UserError, match="`size` is 60x60 pixels; this network takes multiples of 8, such as 64x64"):
        placed((100, 200), 60, multiple=8)
    with pytest.raises(UserError, match="'native' keeps proportions"):
        placed((100, 200), (64, 64), mode="native")
    with pytest.raises(ValueError, match="an image is 0x5 pixels"):
        placed((0, 5), 64)


def test_resizing_is_antialiased_and_stays_in_range():
    noise = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    assert prepare(noise, 16).images.std() < 0.08  # 64 pixels make one; without a filter it is 0.25
    edge = torch.zeros(1, 3, 64, 64)
    edge[..., 32:] = 1
    large = prepare(edge, 160).images
    assert large.min() >= 0
    assert large.max() <= 1
    same = torch.rand(2, 3, 16, 16)
    assert torch.equal(prepare(same, 16).images, same)


def test_gradients_reach_the_images():
    images = torch.rand(1, 3, 20, 20, requires_grad=True)
    prepare(images, 16, mode="letterbox").images.sum().backward()
    assert images.grad is not None
    assert images.grad.abs().min() > 0


def test_equal_pixels_have_equal_keys_whatever_stores_them():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    forms = [Image.fromarray(pixels), pixels, tensor.contiguous(), tensor.float() / 255, Image.fromarray(pixels)]
    keys = [image_keys([form])[0] for form in forms]
    assert len(set(keys)) == 1
    assert image_keys((tensor.float() / 255)[None]) == keys[:1]
    assert 0 <= keys[0] < 2**63
    other = pixels.copy()
    other[4, 6, 2] ^= 1
    assert image_keys([other]) != keys[:1]
    assert image_keys([np.zeros((2, 6, 3), np.uint8)]) != image_keys([np.zeros((3, 4, 3), np.uint8)])


def test_keys_are_those_of_the_original_at_any_size():
    images = torch.rand(2, 3, 40, 30, generator=torch.Generator().manual_seed(1))
    assert prepare(images, 16).keys == prepare(images, 32, mode="crop").keys == tuple(image_keys(images))
    assert prepare(images, 16, keys=[3, 4]).keys == (3, 4)
    with pytest.raises(ValueError, match="2 images and 1 `keys`"):
        prepare(images, 16, keys=[3])


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16", "1"])
def test_any_kind_of_pillow_image_is_rgb_first(mode):
    grey = Image.fromarray(np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    else:
        image = grey.convert("RGB").convert(mode) if mode != "LA" else grey.convert("LA")
    ready = prepare([image], None)
    expected = image.convert("RGB") if mode not in ("I;16", "LA", "RGBA") else grey.convert("RGB")
    assert torch.equal((ready.images[0] * 255).round().byte(), torch.from_numpy(np.array(expected)).permute(2, 0, 1))


def test_transparency_lies_on_white_and_orientation_is_followed():
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert prepare([clear], 8).images.min() > 0.9999
    upright = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6))
    turned = upright.copy()
    turned.getexif()[0x0112] = 6  # shown turned by a quarter
    ready = prepare([turned], None)
    assert ready.placements[0].original == (6, 4)
    assert ready.keys == tuple(image_keys([upright.transpose(Image.Transpose.ROTATE_270)]))


def test_the_published_way_resizes_before_it_converts():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (30, 40, 4), dtype=np.uint8), "RGBA")
    palette = Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).quantize(16)
    for picture in (image, palette):
        expected = np.array(picture.resize((16, 16), Image.Resampling.BICUBIC).convert("RGB"))
        found = prepare([picture], 16, published=True).images[0]
        assert torch.equal((found * 255).round().byte(), torch.from_numpy(expected).permute(2, 0, 1))
        assert (prepare([picture], 16).images[0] - found).abs().max() > 0.05
    tensors = torch.rand(1, 3, 40, 40)
    plain = torch.nn.functional.interpolate(tensors, (16, 16), mode="bilinear", align_corners=False)
    assert torch.equal(prepare(tensors, 16, published=True).images, plain)
    with pytest.raises(UserError, match="published protocol ignores proportions"):
        prepare([image], 16, mode="crop", published=True)


def test_images_of_one_batch_end_up_at_one_size():
    pictures = [Image.new("RGB", (40, 20)), Image.new("RGB", (20, 40))]
    assert tuple(prepare(pictures, 16).images.shape) == (2, 3, 16, 16)
    with pytest.raises(UserError, match="end up at 8x16 and 16x8 pixels"):
        prepare(pictures, 16, mode="native", multiple=8)
    with pytest.raises(ValueError, match="there is no image"):
        prepare([], 16)
    with pytest.raises(ValueError, match="both sides must be at least 1"):
        prepare(torch.zeros(1, 3, 0, 4), 16)
