"""Pictures of points, and what is read off them: rendering, probing, and scores of edits and samples."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffcore.errors import UserError
from diffcore.io.shipped import shipped_folder
from diffcore.metrics import FeatureExtractor, Preprocessing
from diffcore.metrics.attribute_network import load_attribute_network
from diffcore.models import DiffusionModel, from_pipeline, generate
from diffcore.run import Run, RunMap
from diffcore.testing import tiny
from diffcore.zoo.portraits.draw import draw
from diffcore.zoo.portraits.people import portraits
from w2w_space.directions import Directions, find_directions
from w2w_space.edit import edit
from w2w_space.evaluate import evaluate_edits, evaluate_samples, recognised
from w2w_space.held_out import gain_kept
from w2w_space.instance import Instance
from w2w_space.labels import Labels
from w2w_space.layout import Layout
from w2w_space.population import Population, Stacked
from w2w_space.probe import ClassifierScorer, TextScorer, classifier_values, probe
from w2w_space.recipe import Recipe, layout_for
from w2w_space.render import render, render_vectors
from w2w_space.scaling import scaling, sizes_of
from w2w_space.space import WeightSpace
from w2w_space.styles import load_styles
from w2w_space.train_population import train_population

PROMPTS = ["ab", "c"]


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    return from_pipeline(tiny.pipeline("sd15"))


@pytest.fixture(scope="module")
def space(model: DiffusionModel) -> WeightSpace:
    layout = layout_for(model, ("to_q", "to_v"), rank=1)
    matrix = 0.3 * torch.randn(30, layout.size, generator=torch.Generator().manual_seed(0))
    population = Population(layout, tuple(f"m{number:02d}" for number in range(30)), Stacked(matrix))
    return WeightSpace.build(population, num_components=6)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("batch_size", [64, 5])
def test_points_draw_what_fused_models_draw(
    model: DiffusionModel, space: WeightSpace, guidance_scale: float, batch_size: int
):
    """Five rows a batch: neither points nor prompts divide it, and both halves of guidance get the adapter."""
    points = [space.member(name) for name in ("m03", "m07", "m11")]
    options: dict[str, Any] = {"seeds": range(3), "steps": 2, "guidance_scale": guidance_scale}
    found = render(model, points, prompts=PROMPTS, batch_size=batch_size, **options)
    assert found.shape == (3, 2, 3, 3, 16, 16)
    for point, own in zip(points, found, strict=True):
        fused = model.with_adapter(point.adapter())
        assert (generate(fused, PROMPTS, **options) - own).abs().max() < 2e-5
    assert (found[0] - found[1]).abs().max() > 1e-3
    base = render_vectors(model, space.layout, torch.zeros(1, space.layout.size), prompts=PROMPTS, **options)
    assert (generate(model, PROMPTS, **options) - base[0]).abs().max() < 2e-5


def test_a_batch_that_memory_does_not_hold_is_halved_without_mixing_points(
    model: DiffusionModel, space: WeightSpace, monkeypatch: pytest.MonkeyPatch
):
    points = [space.member("m01"), space.member("m02")]
    options: dict[str, Any] = {"prompts": ["ab"], "seeds": range(2), "steps": 1}
    expected = render(model, points, **options)
    forward = type(model.denoiser).forward

    def small(self: Any, x_t: Tensor, t: Tensor, cond: Any = None) -> Any:
        if len(x_t) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, x_t, t, cond)

    monkeypatch.setattr(type(model.denoiser), "forward", small)
    assert (render(model, points, **options) - expected).abs().max() < 2e-5


def test_delayed_injection_draws_with_the_edited_point_from_a_timestep_on(model: DiffusionModel, space: WeightSpace):
    before, after = [space.member("m01"), space.member("m05")], [space.member("m02"), space.member("m06")]
    options: dict[str, Any] = {"prompts": ["ab"], "seeds": range(2), "steps": 4, "guidance_scale": 2.0}
    early, late, half = (
        render(model, after, original=before, timestep=timestep, **options) for timestep in (1000, -1, 500)
    )
    assert torch.equal(early, render(model, after, **options))
    assert torch.equal(late, render(model, before, **options))
    assert not torch.equal(half, early)
    assert not torch.equal(half, late)
    seen = list[tuple[float, float]]()
    module = model.backbone.get_submodule(space.layout.modules[0])

    def note(_: Any, args: Any, output: Tensor) -> None:
        seen.append((times[-1], float(output.sum())))

    times = list[float]()
    handles = [
        model.denoiser.register_forward_pre_hook(lambda _, args: times.append(float(args[1][0]))),
        module.register_forward_hook(note),
    ]
    try:
        render(model, before, **options)
        plain = [value for _, value in seen]
        seen.clear()
        render(model, after, original=before, timestep=500, **options)
    finally:
        for handle in handles:
            handle.remove()
    # Up to the switch the network computes what it does with the original points.
    same = [t for (t, value), other in zip(seen, plain, strict=True) if value == other]
    assert same == [t for t, _ in seen if t > 500]


def test_adapters_of_convolutions_draw_one_after_the_other(model: DiffusionModel):
    shapes = {"conv_in": tuple(model.backbone.conv_in.weight.shape)}
    layout = Layout.of(shapes, rank=1)
    vectors = 0.3 * torch.randn(2, layout.size, generator=torch.Generator().manual_seed(0))
    found = render_vectors(model, layout, vectors, prompts=["ab"], seeds=[0], steps=2)
    for vector, own in zip(vectors, found, strict=True):
        fused = model.with_adapter(layout.adapter(vector))
        assert (generate(fused, ["ab"], seeds=[0], steps=2) - own).abs().max() < 2e-5


def test_every_point_draws_every_class():
    model = from_pipeline(tiny.pipeline("dit"))
    layout = layout_for(model, ("to_q",), rank=1)
    vectors = 0.3 * torch.randn(2, layout.size, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"labels": [3, 1], "seeds": [0, 1], "steps": 1}
    found = render_vectors(model, layout, vectors, **options)
    assert found.shape[:3] == (2, 2, 2)
    for vector, own in zip(vectors, found, strict=True):
        assert (generate(model.with_adapter(layout.adapter(vector)), **options) - own).abs().max() < 2e-5
    assert (found[:, 0] - found[:, 1]).abs().max() > 1e-3


def test_what_cannot_be_drawn_is_refused(model: DiffusionModel, space: WeightSpace):
    other = WeightSpace.build(
        Population(space.layout, tuple("abcd"), Stacked(torch.randn(4, space.layout.size))), num_components=2
    )
    with pytest.raises(UserError, match="no points"):
        render(model, [], prompts=["ab"])
    with pytest.raises(UserError, match="several spaces"):
        render(model, [space.point(), other.point()], prompts=["ab"])
    with pytest.raises(ValueError, match="1 points in `original` for 2"):
        render(model, [space.point()] * 2, prompts=["ab"], original=[space.point()])


@dataclass(frozen=True)
class Brightness:
    """Scores the mean of the red and of the green channel."""

    attributes: tuple[str, ...] = ("red", "green")
    digest: str = "brightness"

    def __call__(self, images: Tensor) -> Tensor:
        return images[:, :2].mean((2, 3)).double()


def test_probing_scores_what_each_member_draws(model: DiffusionModel, space: WeightSpace):
    options: dict[str, Any] = {"prompts": ["ab"], "seeds": range(2), "steps": 2}
    found, left = probe(model, space, Brightness(), group_size=7, **options)
    assert left == []
    assert found.attributes == ("red", "green")
    points = [space.member(name) for name in space.names]
    drawn = render(model, points, **options)
    assert (found.values - drawn[:, :, :, :2].mean((1, 2, 4, 5)).double()).abs().max() < 1e-5
    again, left = probe(model, space, _Flat(), **options)
    assert again.attributes == ("green",)
    assert left == ["'red' is the same for all members"]
    with pytest.raises(UserError, match="without its members"):
        probe(model, space.without_members(), Brightness(), **options)


class _Flat(Brightness):
    def __call__(self, images: Tensor) -> Tensor:
        return Brightness.__call__(self, images) * torch.tensor([0.0, 1.0])


class _Blind(Brightness):
    def __call__(self, images: Tensor) -> Tensor:
        return 0 * Brightness.__call__(self, images)


def test_what_shows_nothing_is_told(model: DiffusionModel, space: WeightSpace):
    with pytest.raises(UserError, match="the pictures of all members score alike"):
        probe(model, space, _Blind(), prompts=["ab"], seeds=[0], steps=1)


def test_probing_is_kept_by_all_that_it_depends_on(model: DiffusionModel, space: WeightSpace, tmp_path: Path):
    drawn = list[int]()

    class Counted(Brightness):
        def __call__(self, images: Tensor) -> Tensor:
            drawn.append(len(images))
            return Brightness.__call__(self, images)

    asked: dict[str, Any] = {"prompts": ["ab"], "seeds": [0], "steps": 1, "group_size": 100}
    with Run.open(tmp_path / "run", command="t", config={}) as run:
        for changed, new in (
            ({}, True),
            ({}, False),
            ({"seeds": [1]}, True),
            ({"prompts": ["cd"]}, True),
            ({"steps": 2}, True),
            ({"guidance_scale": 2.0}, True),
            ({}, False),
        ):
            drawn.clear()
            probe(model, space, Counted(), map=RunMap(run), **(asked | changed))
            assert bool(drawn) == new, changed
        drawn.clear()
        probe(model, space, Counted(digest="another"), map=RunMap(run), **asked)
        assert drawn


def test_models_of_classes_are_probed_by_class():
    model = tiny.model("unet2d")
    layout = layout_for(model, ("to_q", "to_v"), 1)
    matrix = torch.randn(4, layout.size, generator=torch.Generator().manual_seed(0))
    space = WeightSpace.build(Population(layout, tuple("abcd"), Stacked(matrix)))
    options: dict[str, Any] = {"labels": [3, 5], "seeds": [0], "steps": 2}
    found, _ = probe(model, space, Brightness(), **options)
    drawn = render(model, [space.member(name) for name in space.names], **options)
    assert (found.values - drawn[:, :, :, :2].mean((1, 2, 4, 5)).double()).abs().max() < 1e-5


def test_a_classifier_with_its_weights_in_another_order_is_another():
    one, other = (load_attribute_network(shipped_folder("portraits-oracle")) for _ in range(2))
    asked = classifier_values(one, ["hat"])
    assert ClassifierScorer(one, asked).digest == ClassifierScorer(other, asked).digest
    with torch.no_grad():
        for value in other.parameters():
            value.copy_(value.flip(0))
    assert ClassifierScorer(one, asked).digest != ClassifierScorer(other, asked).digest
    assert ClassifierScorer(one, asked).digest != ClassifierScorer(one, classifier_values(one, ["man"])).digest


def test_the_classifier_scores_portraits_by_their_classes():
    oracle = load_attribute_network(shipped_folder("portraits-oracle"))
    people = portraits(5, range(100))
    scorer = ClassifierScorer(oracle, classifier_values(oracle))
    scores = dict(zip(scorer.attributes, scorer(draw(people, 32)).T, strict=True))
    for name, true in (
        ("hat", people["hat"] > 0),
        ("man", people["gender"] == 1),
        ("blond hair", people["hair"] == 2),
        ("dark skin", people["skin"] == 4),
    ):
        assert ((scores[name] > 0.5) == true).float().mean() > 0.85, name
    assert set(classifier_values(oracle, ["hat", "glasses"])) == {"hat", "glasses"}
    with pytest.raises(UserError, match="knows no 'wings'"):
        classifier_values(oracle, ["wings"])
    with pytest.raises(UserError, match="no 'wing'"):
        ClassifierScorer(oracle, {"wings": ("wing", (0.0, 1.0))})
    with pytest.raises(UserError, match="2 values for the 3 classes"):
        ClassifierScorer(oracle, {"hat": ("hat", (0.0, 1.0))})


def test_a_text_scorer_tells_which_text_is_nearer():
    def read(network: torch.nn.Module, images: Tensor) -> Tensor:
        return images.mean((2, 3))[:, :2]

    preprocessing = Preprocessing((4, 4), None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    extractor = FeatureExtractor("means", "0", preprocessing, torch.nn.Linear(1, 1), read)

    def text(prompts: Any) -> Tensor:
        return torch.tensor([[1.0, 0.0] if prompt == "red" else [0.0, 1.0] for prompt in prompts])

    scorer = TextScorer(extractor, text, {"red": ("red", "green"), "green": ("green", "red")})
    pictures = torch.zeros(2, 3, 4, 4)
    pictures[0, 0] = pictures[1, 1] = 1.0
    scores = scorer(pictures)
    assert scores[:, 0].tolist() == pytest.approx([1.0, 0.0], abs=1e-6)
    assert (scores.sum(1) - 1).abs().max() < 1e-6
    # Texts that are nearly alike, and pictures of any brightness: the score is that of the cosines.
    near = {"red": torch.tensor([1.0, 0.0]), "green": torch.tensor([0.995, 0.1])}
    scorer = TextScorer(extractor, lambda words: torch.stack([near[word] for word in words]), {"red": ("red", "green")})
    shown = torch.tensor([1.0, 0.06])
    with_, without = (float(shown @ text / shown.norm() / text.norm()) for text in near.values())
    expected = 1 / (1 + math.exp(100 * (without - with_)))
    for brightness in (1.0, 0.2):
        picture = brightness * torch.cat([shown, torch.zeros(1)]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
        assert float(scorer(picture)) == pytest.approx(expected, abs=1e-4)


@pytest.fixture(scope="module")
def directions(model: DiffusionModel, space: WeightSpace) -> Directions:
    found, _ = probe(model, space, Brightness(), prompts=["ab"], seeds=range(2), steps=2)
    return find_directions(space, found)


def test_edits_are_scored_by_pictures_before_and_after(
    model: DiffusionModel, space: WeightSpace, directions: Directions
):
    options: dict[str, Any] = {"prompts": ["ab"], "seeds": range(2), "steps": 2}
    subjects = [space.member("m00"), space.member("m01"), space.member("m02")]
    mask = torch.zeros(16, 16)
    mask[:4] = 1

    def features(images: Tensor) -> Tensor:
        return images.flatten(1)

    found = evaluate_edits(
        model, subjects, directions, Brightness(), strengths=2.0, features=features, mask=mask, **options
    )
    before = render(model, subjects, **options)
    moved = [edit(point, {"red": 2.0}, directions).point for point in subjects]
    after = render(model, moved, **options)
    row = found.rows[0]
    assert row.name == "red"
    assert row.effect == pytest.approx(float((after - before)[:, :, :, 0].mean()), abs=1e-5)
    assert row.leaked == "green"
    change = (after - before)[:, :, :, 1].mean((1, 2, 3, 4)).abs().mean()
    assert row.leak == pytest.approx(float(change), abs=1e-5)
    assert row.background == pytest.approx(float((after - before)[..., :4, :].abs().mean()), abs=1e-6)
    assert row.difference == pytest.approx(float((after - before).abs().mean()), abs=1e-6)
    unit = torch.nn.functional.normalize(before.flatten(3).flatten(1, 2), dim=2)
    other = torch.nn.functional.normalize(after.flatten(3).flatten(1, 2), dim=2)
    crossed = [(unit[i, 0] @ other[i, 1] + unit[i, 1] @ other[i, 0]) / 2 for i in range(3)]
    assert row.identity == pytest.approx(float(sum(crossed)) / 3, abs=1e-5)
    assert found.same == pytest.approx(float((unit[:, 0] * unit[:, 1]).sum(1).mean()), abs=1e-5)
    crossed = [unit[i, 0] @ unit[j, 1] for i in range(3) for j in range(3) if i != j]
    assert found.different == pytest.approx(float(sum(crossed)) / 6, abs=1e-5)
    assert found.kept(row) == pytest.approx((row.identity - found.different) / (found.same - found.different))
    # Pictures of the same subjects are recognised as well as the two kinds of pictures above are.
    alike = recognised(model, subjects, before, features=features, **options)
    assert float(alike.mean()) == pytest.approx(found.same, abs=1e-5)
    edited = recognised(model, subjects, after, features=features, **options)
    assert float(edited.mean()) == pytest.approx(row.identity, abs=1e-5)
    # The other scores are held, and a direction is judged by the score that it is said to move.
    asked: dict[str, Any] = {"strengths": {"red": 2.0}, "scored_as": {"red": "green", "green": "red"}, **options}
    held = evaluate_edits(model, subjects, directions, Brightness(), keep_others=True, **asked).rows[0]
    apart = render(model, [edit(p, {"red": 2.0}, directions, keep=["green"]).point for p in subjects], **options)
    assert held.effect == pytest.approx(float((apart - before)[:, :, :, 1].mean()), abs=1e-5)
    assert held.difference == pytest.approx(float((apart - before).abs().mean()), abs=1e-6)
    assert held.difference != pytest.approx(row.difference, rel=1e-3)
    nothing = evaluate_edits(model, subjects, directions, Brightness(), strengths={"red": 0.0}, **options)
    assert [row.name for row in nothing.rows] == ["red"]
    assert abs(nothing.rows[0].effect) < 1e-6
    with pytest.raises(UserError, match="name them alike"):
        evaluate_edits(model, subjects, directions, Brightness(("wings", "tails")), **options)
    with pytest.raises(UserError, match="single seed"):
        evaluate_edits(model, subjects, directions, Brightness(), features=features, **(options | {"seeds": [0]}))
    with pytest.raises(UserError, match="`mask` is empty"):
        evaluate_edits(model, subjects, directions, Brightness(), mask=torch.zeros(16, 16), **options)
    with pytest.raises(UserError, match="scale it"):
        evaluate_edits(model, subjects, directions, Brightness(), mask=torch.ones(8, 8), **options)


def test_copies_are_near_and_alike(model: DiffusionModel, space: WeightSpace):
    options: dict[str, Any] = {"prompts": ["ab"], "seeds": [0], "steps": 2}

    def features(images: Tensor) -> Tensor:
        return images.flatten(1) - 0.5

    copies = evaluate_samples(space, [space.member("m00")] * 3, model, features=features, **options)
    assert copies.nearest.abs().max() < 1e-2
    assert copies.diversity == pytest.approx(0, abs=1e-5)
    some = [space.member(name) for name in space.names[:12]]
    few = evaluate_samples(space, some[:3], model, features=features, **options)
    shown = torch.nn.functional.normalize(features(render(model, some[:3], **options).flatten(0, 2)), dim=1)
    pairs = [float(shown[i] @ shown[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert few.diversity == pytest.approx(1 - sum(pairs) / 3, abs=1e-5)
    # All members are as varied as all members, in whatever order.
    whole = replace(space, names=space.names[:12], members=space.members[:12])
    every = evaluate_samples(whole, some, model, features=features, **options)
    assert every.diversity == pytest.approx(every.members_diversity, abs=1e-5)
    assert every.diversity > 1e-3
    others = evaluate_samples(space, [space.point(3.0 * torch.ones(6))])
    assert others.nearest.min() > 3
    assert others.diversity != others.diversity


def test_more_members_tell_more_and_sizes_are_checked():
    population, styles = load_styles()
    labels = Labels(("ink", "background"), styles[:, :2].double())
    few, many = scaling(population, labels, [16, 100], parts=2)
    assert (few.components, many.components) == (8, 20)
    assert many.r2.mean() > few.r2.mean() + 0.2
    assert many.r2.shape == (2, 2)
    assert many.cosines.mean() < 0.2
    shuffled = Labels(labels.attributes, labels.values[torch.randperm(160, generator=torch.Generator().manual_seed(1))])
    assert scaling(population, shuffled, [100], parts=2)[0].r2.mean() < 0.1
    assert sizes_of(["8", "all", "4"], 12) == [4, 8, 12]
    with pytest.raises(UserError, match="no number of members"):
        sizes_of(["many"], 12)
    with pytest.raises(UserError, match="129 members was asked for; 128 of 160"):
        scaling(population, labels, [129])


def test_projections_keep_what_the_space_holds():
    """Subjects whose adapters lie in the space keep all of their gain; others keep less of it, or lose."""
    model = tiny.model("unet2d")
    recipe = Recipe(targets=("to_q", "to_v"), alpha=1.0, learning_rate=0.02, steps=30, batch_size=4, weight_decay=0.0)
    pictures = torch.randn(6, 4, *model.shape, generator=torch.Generator().manual_seed(0))
    condition = {"class_labels": torch.arange(4)}
    people = [Instance(f"p{place}", own, condition) for place, own in enumerate(pictures)]
    layout = layout_for(model, recipe.targets, recipe.rank)
    trained = torch.stack([member.vector for member in train_population(model, people, recipe)]).float()
    noise = 0.05 * torch.randn(8, layout.size, generator=torch.Generator().manual_seed(1))
    inside = torch.cat([trained, noise])
    space = WeightSpace.build(Population(layout, tuple(map(str, range(14))), Stacked(inside)))
    asked: dict[str, Any] = {"factors": (1.0, 2.0, 0.0), "num_pairs": 8}
    kept = gain_kept(space, model, trained, people, components=[1, space.num_components], **asked)
    assert kept.projected.shape == (2, 3, 6)
    assert (kept.base > kept.own).all()
    assert float(kept.gain_kept[1, 0]) == pytest.approx(1.0, abs=1e-3)
    assert float(kept.gain_kept[0, 0]) < 0.7
    assert float(kept.gain_kept[1, 1]) < 0.95  # twice as far as the subjects
    assert torch.allclose(kept.projected[:, 2], kept.mean.expand(2, -1))
    assert kept.gain_of_mean == pytest.approx(float(kept.gain_kept[0, 2]))
    assert kept.chosen == (space.num_components, 1.0)
    with pytest.raises(UserError, match="the space has 13"):
        gain_kept(space, model, trained, people, components=[14])
