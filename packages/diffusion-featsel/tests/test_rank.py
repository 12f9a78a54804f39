"""The pass of a ranking on small networks: the same numbers from any batches, parts and processes."""

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from diffcore.models import DiffusionModel
from diffcore.run import Run, RunMap
from diffcore.testing import tiny
from diffcore.testing.distributed import run_forked
from diffusion_featsel import survey
from diffusion_featsel.extractor import FeatureExtractor
from diffusion_featsel.inventory import inventory
from diffusion_featsel.judge import find_points
from diffusion_featsel.pairs import Pair
from diffusion_featsel.rank import score
from diffusion_featsel.ranking import SCORES, Ranking

NAMES = ["unet-in", "down-level0-repeat0-res-out", "mid-vit-block0-self-q", "up-level0-repeat0-res-out", "unet-out"]


@pytest.fixture(scope="module")
def model() -> DiffusionModel:
    return tiny.model("sd15")


@pytest.fixture(scope="module")
def images() -> Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.nn.functional.interpolate(torch.rand(24, 3, 6, 6, generator=g), (16, 16), mode="bilinear")


def states(model: DiffusionModel) -> dict[str, Tensor]:
    return {"encoder_hidden_states": torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1))}


def ranked(model: DiffusionModel, images: Tensor, **settings: Any) -> Ranking:
    def encode(some: Tensor) -> Tensor:
        return 30 * model.codec.encode(some)  # a random autoencoder encodes faintly; now x0 is about as large as noise

    return score(model, images, inventory(model).named(NAMES), condition=states(model), encode=encode, **settings)


def numbers(ranking: Ranking) -> Tensor:
    return torch.tensor([[torch.nan if v is None else v for v in row.numbers().values()] for row in ranking.rows])


def test_batches_and_parts_do_not_change_the_numbers(model: DiffusionModel, images: Tensor, tmp_path: Path) -> None:
    whole = ranked(model, images, batch_size=1000)
    small = ranked(model, images, batch_size=1)
    torch.testing.assert_close(numbers(small), numbers(whole), rtol=2e-3, atol=2e-3, equal_nan=True)
    assert whole.similarity is not None
    assert small.similarity is not None
    torch.testing.assert_close(small.similarity, whole.similarity, rtol=1e-3, atol=1e-3, equal_nan=True)
    with Run.open(tmp_path / "run", command="test", config={}) as run:
        parts = ranked(model, images, batch_size=1000, parts=3, map=RunMap(run))
        calls = model.denoiser.register_forward_hook(lambda *_: pytest.fail("a finished part was computed again"))
        again = ranked(model, images, batch_size=1000, parts=3, map=RunMap(run))
        calls.remove()
    torch.testing.assert_close(numbers(parts), numbers(whole), rtol=2e-3, atol=2e-3, equal_nan=True)
    torch.testing.assert_close(numbers(again), numbers(parts), equal_nan=True)


def test_a_batch_that_memory_does_not_hold_leaves_nothing_in_the_sums(
    model: DiffusionModel, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second batch fails half way, after some activations were added to."""
    images = torch.cat([images, images[:8].flip(3)])
    expected, seen = ranked(model, images, batch_size=24), []
    add = survey.ActivationSums.add

    def failing(self: survey.ActivationSums, views: survey.Views) -> None:
        seen.append(len(views.batch))
        if len(seen) == len(NAMES) + 3:
            raise RuntimeError("CUDA out of memory")
        add(self, views)

    monkeypatch.setattr(survey.ActivationSums, "add", failing)
    found = ranked(model, images, batch_size=48)
    # Two groups at a time until memory runs out, then the first two anew and the others, one at a time.
    assert seen == [16] * (len(NAMES) + 3) + [8] * 4 * len(NAMES)
    torch.testing.assert_close(numbers(found), numbers(expected), rtol=2e-3, atol=2e-3, equal_nan=True)


def test_two_processes_share_the_parts(model: DiffusionModel, images: Tensor, tmp_path: Path) -> None:
    from lightning.fabric import Fabric

    alone = numbers(ranked(model, images, parts=2, map=RunMap(Run.open(tmp_path / "alone", command="t", config={}))))
    Run.open(tmp_path / "both", command="t", config={}).close()

    def on_rank(rank: int) -> Tensor:
        fabric = _Ranks(rank)
        with Run.open(tmp_path / "both", command="t", config={}) as run:
            return numbers(ranked(model, images, parts=2, map=RunMap(run, fabric)))

    class _Ranks(Fabric):
        """Two processes that gloo already joined."""

        def __init__(self, rank: int) -> None:
            self.rank = rank

        global_rank = property(lambda self: self.rank)
        world_size = property(lambda self: 2)

        def barrier(self, name: str | None = None) -> None:
            torch.distributed.barrier()

    for found in run_forked(on_rank):
        torch.testing.assert_close(found, alone, equal_nan=True)


@pytest.mark.parametrize(("t", "low", "high"), [(900.0, 0.9, 1.0), (0.0, 0.0, 0.1)])
def test_the_input_leaks_noise_only_where_there_is_much(
    model: DiffusionModel, images: Tensor, t: float, low: float, high: float
) -> None:
    leak = ranked(model, images, t=t, measurements=("readout",))["unet-in"].noise_leak
    assert leak is not None
    assert low <= leak <= high


def test_an_activation_without_noise_is_reported_as_such(model: DiffusionModel, images: Tensor) -> None:
    """The noise is taken away, so both draws agree: all that varies is content."""

    schedule = model.denoiser.schedule

    class Quiet:
        def __getattr__(self, name: str) -> object:
            return getattr(schedule, name)

        def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
            return x0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.denoiser, "schedule", Quiet())
        row = ranked(model, images)["mid-vit-block0-self-q"]
    assert row.reliability == pytest.approx(1, abs=1e-5)
    assert row.snr_db is None or row.snr_db > 50


def test_a_constant_activation_is_not_ranked(model: DiffusionModel, images: Tensor) -> None:
    site = "up_blocks.0.resnets.0"
    handle = model.backbone.get_submodule(site).register_forward_hook(lambda m, a, out: torch.ones_like(out))
    try:
        found = ranked(model, images)
    finally:
        handle.remove()
    row = found["up-level0-repeat0-res-out"]
    assert row.reliability is None
    assert row.fisher is None
    assert all("up-level0-repeat0-res-out" not in found.scores(name) for name in SCORES)
    assert found.similarity is not None
    assert found.similarity[3].isnan().all()


def test_values_that_are_no_numbers_are_named_and_the_rest_is_kept(model: DiffusionModel, images: Tensor) -> None:
    handle = model.backbone.get_submodule("conv_out").register_forward_hook(lambda m, a, out: out * torch.inf)
    try:
        found = ranked(model, images)
    finally:
        handle.remove()
    assert list(found.broken) == ["unet-out"]
    assert "bfloat16" in found.broken["unet-out"]
    assert [row.name for row in found.rows] == NAMES[:-1]


def test_another_timestep_changes_noisy_activations_most(model: DiffusionModel, images: Tensor) -> None:
    found = ranked(model, images, t=20.0, other_t=900.0, measurements=("samples",))
    assert found["unet-in"].t_dependence is not None
    assert found["unet-in"].t_dependence > 0.5
    same = ranked(model, images, t=20.0, other_t=20.5, measurements=("samples",))
    assert abs(same["unet-in"].t_dependence or 0) < 0.01


def test_too_few_images_and_text_are_refused(model: DiffusionModel, images: Tensor) -> None:
    with pytest.raises(ValueError, match="there are 15 images; ranking needs at least 16"):
        ranked(model, images[:15])
    text = inventory(model).named(["down-level0-repeat0-vit-block0-cross-k"])
    with pytest.raises(ValueError, match="have no image places"):
        score(model, images, text)
    with pytest.raises(ValueError, match="are attention maps, which hold tokens"):
        score(model, images, inventory(model).match("mid-vit-block0-cross-map"))
    with pytest.raises(ValueError, match="and so is `t`; give another timestep"):
        ranked(model, images, other_t=50.0)


def test_seventeen_images_are_two_groups(model: DiffusionModel, images: Tensor) -> None:
    assert ranked(model, images[:17]).num_images == 17


def test_the_networks_hooks_are_gone_afterwards(model: DiffusionModel, images: Tensor) -> None:
    ranked(model, images)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.backbone.modules())


def test_the_order_is_that_of_the_score(model: DiffusionModel, images: Tensor) -> None:
    found = ranked(model, images)
    values = list(found.scores().values())
    assert values == sorted(values, reverse=True)
    rows = {row["name"]: row for row in found.to_rows()}
    assert [rows[name]["rank"] for name in found.scores()] == [1, 2, 3, 4, 5]


def _found(model: DiffusionModel, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what a ranking, the labelled search and an extractor make of a model."""
    points = torch.tensor([[1.0, 2.0], [8.0, 3.0], [12.0, 13.0]])
    pair = Pair("0", "1", points, points, (16, 16), (16, 16))
    named, condition = dict(zip("01", images, strict=False)), states(model)
    some = inventory(model).named(NAMES)
    matched = find_points(model, named, [pair], some, condition=condition, centered=False)
    features = FeatureExtractor(model, NAMES[2:4], extra=condition)(images[:2])
    return (
        numbers(ranked(model, images[:16])),
        torch.stack([matched[name][0] for name in NAMES]),
        torch.cat([maps.flatten() for maps in features.values()]),
    )


@pytest.mark.parametrize("change", ["fused", "sliced", "checkpointed", "offloaded"])
def test_what_changes_no_number_of_the_network_changes_no_result(images: Tensor, change: str) -> None:
    model = tiny.model("sd15")
    backbone: Any = model.backbone
    expected = _found(model, images)
    match change:
        case "fused":
            backbone.fuse_qkv_projections()
        case "sliced":
            backbone.set_attention_slice("max")
        case "checkpointed":
            backbone.enable_gradient_checkpointing()
        case _:
            accelerate.cpu_offload(backbone, execution_device=torch.device("cpu"))
    for found, known in zip(_found(model, images), expected, strict=True):
        torch.testing.assert_close(found, known, rtol=1e-3, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("change", ["adapter", "FreeU"])
def test_what_changes_the_network_changes_every_result(images: Tensor, change: str) -> None:
    model = tiny.model("sd15")
    backbone: Any = model.backbone
    expected = _found(model, images)
    if change == "adapter":
        backbone.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    else:
        backbone.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    for found, known in zip(_found(model, images), expected, strict=True):
        assert not torch.allclose(found.nan_to_num(), known.nan_to_num(), atol=1e-4)
