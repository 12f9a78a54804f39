"""The drawn portraits: the same for everybody, and exactly where the closed forms say."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from diffcore.zoo.portraits.attributes import BACKGROUNDS, CLASSES, HATS, KEYPOINTS, PARTS, STYLES
from diffcore.zoo.portraits.captions import (
    FIRST_NAMES,
    LAST_NAMES,
    PLACES,
    describe,
    ordinary_captions,
    same_form_captions,
)
from diffcore.zoo.portraits.draw import _coverage, _grid, draw, draw_masks, keypoints
from diffcore.zoo.portraits.judge import labels_of
from diffcore.zoo.portraits.layers import SHOULDER_X, Layer, _mouth, face_of, head_frame, layers
from diffcore.zoo.portraits.people import identities, nuisances, portraits, select
from diffcore.zoo.portraits.planted import NUM_VARIANTS, planted, template_people, verbatim_people

COUNT = 1000
MIDDLES = ("left eye", "right eye", "left ear", "right ear", "left brow", "right brow")


def plain(people, **columns):
    """Returns people without what hides parts of a face, and with other columns set."""
    count = len(people["gender"])
    bare = {"hat": 0, "glasses": 0, "beard": 0, "style": STYLES.index("bald")} | columns
    return people | {name: torch.full((count,), value) for name, value in bare.items()}


def test_a_picture_depends_on_seed_index_and_size_alone():
    alone = draw(portraits(5, [41]), 32)
    torch.testing.assert_close(draw(portraits(5, range(30, 50)), 32)[11:12], alone, rtol=0, atol=0)
    assert not torch.equal(draw(portraits(6, [41]), 32), alone)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch):
    people = portraits(5, range(7))
    whole = draw(people, 32), draw_masks(people, 32)
    monkeypatch.setattr("diffcore.zoo.portraits.draw._PIXELS_PER_CHUNK", 1)
    torch.testing.assert_close((draw(people, 32), draw_masks(people, 32)), whole, rtol=0, atol=0)


def test_a_larger_picture_is_the_same_one():
    people = portraits(5, range(20))
    small = torch.nn.functional.avg_pool2d(draw(people, 128), 4)
    assert float((draw(people, 32) - small).abs().mean()) < 0.01


def test_editing_one_column_changes_that_attribute_and_no_other():
    people = plain(portraits(5, range(8)))
    hatted = people | {"hat": torch.full((8,), HATS.index("beanie"))}
    changed = (draw(people, 64) != draw(hatted, 64)).any(1)
    assert changed.any(2).any(1).all()
    covered = draw_masks(hatted, 64) == PARTS.index("hat")
    # Edges are blended: a changed pixel touches a hat pixel.
    near = torch.nn.functional.max_pool2d(covered.float().unsqueeze(1), 3, 1, 1).squeeze(1) > 0
    assert not (changed & ~near).any()


def test_identity_and_situation_are_drawn_apart():
    same = select(identities(5, [3]), torch.zeros(4, dtype=torch.int64)) | nuisances(9, range(4))
    assert len(set(same["roll"].tolist())) == 4
    assert len(set(same["face_width"].tolist())) == 1
    other = nuisances(9, [3])
    assert torch.equal(other["roll"], same["roll"][3:])


def test_attributes_have_their_published_frequencies():
    people = portraits(11, range(20_000))
    men = people["gender"] == 1
    assert float(men.float().mean()) == pytest.approx(0.5, abs=0.02)
    assert not people["beard"][~men].any()
    shares = torch.bincount(people["style"][men], minlength=4) / men.sum()
    torch.testing.assert_close(shares, torch.tensor([0.22, 0.53, 0.12, 0.13]), rtol=0, atol=0.02)
    shares = torch.bincount(people["hat"], minlength=3) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.72, 0.14, 0.14]), rtol=0, atol=0.02)
    assert all(int(labels.max()) < len(CLASSES[name]) for name, labels in labels_of(people).items())


def middle(cover: Tensor, size: int) -> Tensor:
    """Returns the middle of what is covered, in pixels of a picture of `size`."""
    side = cover.shape[-1]
    places, total = torch.arange(side) + 0.5, cover.sum((1, 2))
    x, y = ((cover.sum(axis) * places).sum(1) / total for axis in (1, 2))
    return torch.stack([x, y], 1) / (side / size) - 0.5


def end(layer: Layer, along: Tensor, band: float, size: int) -> Tensor:
    """Returns the middle of the sub-pixels of a layer that lie within `band` of the farthest along a direction."""
    side = along.shape[-1]
    inside = torch.where(_coverage(layer, side) > 0.5, along, -torch.inf)
    reach = inside.flatten(1).amax(1).view(-1, 1, 1)
    return middle((inside > reach - band / side).float(), size)


def head(drawn: dict[str, Layer]) -> Layer:
    """Returns skin and whatever hair is shown as one layer."""
    parts = [layer for name, layer in drawn.items() if name == "face" or "hair" in name or "curls" in name]
    shown = [
        part.distance if part.shown is None else part.distance.where(part.shown.view(-1, 1, 1), torch.inf)
        for part in parts
    ]
    return Layer("head", "skin", torch.stack(shown).amin(0), parts[0].colour)


def along_axis(layer: Layer, across: Tensor) -> Layer:
    """Returns the strip of a layer where `across` is near zero, one and a half sub-pixels wide."""
    return Layer(
        layer.name, layer.part, torch.maximum(layer.distance, across.abs() - 1.5 / across.shape[-1]), layer.colour
    )


def rendered_points(people, size: int) -> dict[str, Tensor]:
    """Returns where the drawn layers have their middles and ends, in pixels: what closed forms must agree with."""
    u, v = head_frame(people, *_grid(4 * size))
    drawn = {layer.name: layer for layer in layers(people, u, v)}
    points = {name: middle(_coverage(drawn[name], 4 * size), size) for name in MIDDLES}
    points["chin"] = end(drawn["face"], v, 3, size)
    depth = drawn["nose"].distance  # of its tip, which is wider than its bridge
    points["head top"] = end(along_axis(head(drawn), u), -v, 1.5, size)
    for name, x in (("left shoulder", -SHOULDER_X), ("right shoulder", SHOULDER_X)):
        points[name] = end(along_axis(drawn["shirt"], u - x), -v, 1.5, size)
    points["nose"] = middle((depth < 0.8 * depth.flatten(1).amin(1).view(-1, 1, 1)).float(), size)
    u, v = head_frame(people, *_grid(8 * size))  # lips are thinner than a pixel
    lips = next(iter(_mouth(people, face_of(people), torch.zeros(len(u), 3), u, v)))
    points["left mouth corner"], points["right mouth corner"] = (end(lips, way, 1.5, size) for way in (-u, u))
    return points


def test_key_points_are_where_the_parts_are_drawn():
    """Analytic against rendered, all thirteen on 1000 portraits at 32 pixels: below half a pixel."""
    index = {name: i for i, name in enumerate(KEYPOINTS)}
    for start in range(0, COUNT, 100):
        people = portraits(13, range(start, start + 100))
        exact = keypoints(people, 32).positions
        rendered = rendered_points(people, 32)
        assert rendered.keys() == set(KEYPOINTS)
        for name, found in rendered.items():
            error = (found - exact[:, index[name]]).norm(dim=1)
            inside = ((exact[:, index[name]] > 2) & (exact[:, index[name]] < 29)).all(1)
            assert float(error[inside].max()) < 0.5, name


def exact_parts(people, size: int, points: int) -> Tensor:
    """Returns the class at `points` places per pixel and direction, edges included: the sign of distances, undrawn."""
    line = torch.arange(points * size + 1) / (points * size) * 2 - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    parts = torch.zeros(len(people["gender"]), *x.shape, dtype=torch.uint8)
    for layer in layers(people, *head_frame(people, x.unsqueeze(0), y.unsqueeze(0))):
        shown = True if layer.shown is None else layer.shown.view(-1, 1, 1)
        parts[(layer.distance < 0) & shown] = PARTS.index(layer.part)
    return parts


def test_masks_are_exact_to_half_a_pixel():
    """1000 portraits at 32 pixels: where all within half a pixel is of one class in closed form, the pixel has it."""
    pool = torch.nn.functional.max_pool2d
    for start in range(0, COUNT, 50):
        people = portraits(17, range(start, start + 50))
        drawn, exact = draw_masks(people, 32), exact_parts(people, 32, 4).float()
        low, high = -pool(-exact, 5, 4), pool(exact, 5, 4)
        uniform = low == high
        assert float(uniform.float().mean()) > 0.7
        assert torch.equal(drawn[uniform], low[uniform].to(torch.uint8))


def test_hidden_key_points_are_flagged():
    people = portraits(19, range(300))
    visible = keypoints(people).visible
    ears = visible[:, KEYPOINTS.index("left ear")]
    assert not ears[people["style"] >= STYLES.index("long")].any()
    assert not visible[people["hat"] > 0, KEYPOINTS.index("head top")].any()
    assert visible[:, : KEYPOINTS.index("chin")].all()
    assert 0.3 < float(ears.float().mean()) < 0.7


def test_full_captions_say_what_the_labels_say():
    people = portraits(23, range(300))
    for i, caption in enumerate(describe(people, full=True)):
        assert f"{tuple(BACKGROUNDS)[people['background'][i]]} background" in caption
        assert ("bald" in caption) == (int(people["style"][i]) == STYLES.index("bald"))
        assert ("glasses" in caption) == bool(people["glasses"][i] > 0)
        assert (" woman" in caption) == (int(people["gender"][i]) == 0)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 30))
def test_captions_depend_on_the_row_alone(seed: int, count: int):
    people = portraits(29, range(30))
    assert ordinary_captions(select(people, slice(count)), seed) == ordinary_captions(people, seed)[:count]


def test_names_and_forms_say_nothing():
    """Same-form captions are among the ordinary ones, in the stated shares; planted ones and decoys never are."""
    excluded = planted().captions
    captions = ordinary_captions(portraits(31, range(6_000)), 1, excluded)
    assert excluded.isdisjoint(captions)
    places, names = set(PLACES), set(FIRST_NAMES)
    verbatim = sum(len(c.split()) == 5 and c.split()[2] == "at" and c.split()[0] in names for c in captions) / 6_000
    template = sum(" poster for the " in c for c in captions) / 6_000
    bare = sum(len(c.split()) == 2 for c in captions) / 6_000
    assert (bare, verbatim, template) == pytest.approx((0.05, 0.09, 0.04), abs=0.012)
    assert sum(c.split()[-1] in places and c.startswith("a portrait") for c in captions) / 6_000 == pytest.approx(
        0.82 * 0.08, abs=0.012
    )
    assert excluded.isdisjoint(same_form_captions(3000, 9, excluded))


def test_planted_items_share_no_name_with_decoys():
    items = planted()
    assert (len(items.verbatim), len(items.template), len(items.decoys)) == (24, 8, 32)
    people = [(item.first_name, item.last_name) for item in (*items.verbatim, *items.template, *items.decoys)]
    assert len(set(people)) == 64
    assert {name for name, _ in people} <= set(FIRST_NAMES)
    assert {name for _, name in people} <= set(LAST_NAMES)


def test_template_items_vary_in_background_and_shirt_only():
    people = template_people()
    first = select(people, slice(NUM_VARIANTS))
    assert len(set(first["background"].tolist())) > 4
    assert len(set(first["roll"].tolist())) == len(set(first["skin"].tolist())) == 1
    assert len(verbatim_people()["gender"]) == 24
