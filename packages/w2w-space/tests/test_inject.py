"""Delayed injection, and another adapter in a live pipeline."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from diffcore.adapters import Adapter
from diffcore.adapters.write import write_adapter
from diffcore.errors import IncompatibleModelError, UserError
from diffcore.testing import tiny
from w2w_space.inject import inject, translated
from w2w_space.layout import Layout
from w2w_space.population import Population, Stacked
from w2w_space.space import WeightSpace
from w2w_space.swap import LiveAdapter, swap

STEPS = 5
SCHEDULERS: dict[str, Any] = {
    "ddim": (diffusers.DDIMScheduler, {}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "dpm": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
}


def layout_of(unet: Any, rank: int = 1) -> Layout:
    names = [name for name, _ in unet.named_modules() if name.endswith(("to_q", "to_v"))]
    return Layout.of({name: tuple(unet.get_submodule(name).weight.shape) for name in names}, rank)


def random_adapter(unet: Any, seed: int, rank: int = 1, strength: float = 0.3) -> Adapter:
    layout = layout_of(unet, rank)
    vector = strength * torch.randn(layout.size, generator=torch.Generator().manual_seed(seed))
    return layout.adapter(vector, f"adapter-{seed}")


def loaded(folder: Path, *adapters: tuple[Adapter, str]) -> Any:
    pipeline = tiny.pipeline("sd15")
    pipeline.set_progress_bar_config(disable=True)
    for adapter, name in adapters:
        path = write_adapter(adapter, folder / f"{adapter.name}.safetensors", dtype=torch.float32, overwrite=True)
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name)
    return pipeline


def draw(pipeline: Any, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        "ab",
        height=16,
        width=16,
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        generator=generator,
        output_type="latent",
        **options,
    ).images


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Any:
    unet = tiny.backbone("sd15")
    pairs = (random_adapter(unet, 0), "own"), (random_adapter(unet, 1), "older")
    return loaded(tmp_path_factory.mktemp("adapters"), *pairs)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_the_switch_happens_at_the_timestep(both: Any, kind: str):
    scheduler, options = SCHEDULERS[kind]
    both.scheduler = scheduler.from_config(both.scheduler.config, **options)
    both.unet.set_adapters("own")
    own = draw(both)
    both.unet.set_adapters("older")
    older = draw(both)
    assert not torch.equal(own, older)

    seen: list[tuple[float, str, int]] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        seen.append((float(args[1]), module.active_adapters()[0], len(args[0])))

    handle = both.unet.register_forward_pre_hook(note, with_kwargs=True)
    times: list[float] = []
    try:
        for timestep in (1000, 500, -1):
            seen.clear()
            callback = inject(both, "own", "older", timestep, num_inference_steps=STEPS)
            first, second = (draw(both, callback_on_step_end=callback) for _ in range(2))
            assert torch.equal(first, second)
            times = [t for t, _, _ in seen[:STEPS]]
            assert [name for _, name, _ in seen] == ["own" if t > timestep else "older" for t in times] * 2
            assert {rows for *_, rows in seen} == {2}  # both branches of guidance in each pass
            if timestep == 1000:
                assert torch.equal(first, older)
            if timestep == -1:
                assert torch.equal(first, own)
            if timestep == 500:
                assert not torch.equal(first, own)
                assert not torch.equal(first, older)
        exactly = inject(both, "own", "older", times[2], num_inference_steps=STEPS)
        seen.clear()
        draw(both, callback_on_step_end=exactly)
        assert [name for _, name, _ in seen] == ["own", "own", "older", "older", "older"]
    finally:
        handle.remove()


def test_wrong_use_of_injection_is_refused(both: Any):
    with pytest.raises(UserError, match="no adapter 'bob'; it has own, older"):
        inject(both, "own", "bob", 500, num_inference_steps=STEPS)
    both.scheduler = diffusers.DDIMScheduler.from_config(both.scheduler.config)  # five steps begin at 801, 50 at 981
    callback = inject(both, "own", "older", 900, num_inference_steps=50)
    with pytest.raises(ValueError, match="began at timestep 801, and 981 was expected, on the other side of 900"):
        draw(both, callback_on_step_end=callback)
    with pytest.raises(ValueError, match="`timesteps` is empty"):
        inject(both, "own", "older", 500, timesteps=[])


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_flow_pipelines_switch_at_their_shifted_timesteps(name: str):
    """The shift of flux depends on the picture's size, so that its timesteps are known only as it runs."""
    pipeline = tiny.pipeline(name)
    pipeline.set_progress_bar_config(disable=True)
    network = pipeline.transformer
    for number, adapter in enumerate(("own", "older")):
        torch.manual_seed(number)
        network.add_adapter(LoraConfig(r=1, target_modules=["to_q", "to_v"], init_lora_weights=False), adapter)
    seen: list[tuple[float, str]] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        seen.append((float(kwargs["timestep"].flatten()[0]), module.active_adapters()[0]))

    handle = network.register_forward_pre_hook(note, with_kwargs=True)
    callback = inject(pipeline, "own", "older", 700)
    try:
        for _ in range(2):
            seen.clear()
            pipeline(
                "ab", height=16, width=16, num_inference_steps=4, guidance_scale=1.0, output_type="latent",
                generator=torch.Generator().manual_seed(0), callback_on_step_end=callback,
            )  # fmt: skip
            times = [float(t) for t in pipeline.scheduler.timesteps]
            assert times[0] == 1000.0
            assert times[1] > 700 > times[-1]  # some other than the first are above
            assert [adapter for _, adapter in seen] == ["own" if t > 700 else "older" for t in times]
    finally:
        handle.remove()


def test_a_pipeline_that_starts_from_a_picture_needs_its_first_timestep(both: Any):
    """Half of the steps are left out, so that the callback's numbers of steps are not places among the timesteps."""
    both.scheduler = diffusers.DDIMScheduler.from_config(both.scheduler.config)
    from_picture = diffusers.StableDiffusionImg2ImgPipeline(**both.components, requires_safety_checker=False)
    from_picture.set_progress_bar_config(disable=True)
    seen: list[tuple[float, str]] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        seen.append((float(args[1]), module.active_adapters()[0]))

    def run(callback: Any) -> None:
        picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        from_picture(
            "ab", image=picture, strength=0.5, num_inference_steps=8, output_type="latent",
            callback_on_step_end=callback,
        )  # fmt: skip

    handle = both.unet.register_forward_pre_hook(note, with_kwargs=True)
    try:
        run(inject(from_picture, "own", "older", 200, timesteps=[376]))
        assert len(seen) == 4
        assert seen[0][0] < 500
        assert [name for _, name in seen] == ["own" if t > 200 else "older" for t, _ in seen]
        assert {name for _, name in seen} == {"own", "older"}
        with pytest.raises(ValueError, match="began at timestep"):
            run(inject(from_picture, "own", "older", 600, num_inference_steps=8))
    finally:
        handle.remove()


def test_timesteps_translate_by_the_noise_ratio():
    from diffcore.denoiser import DiscreteSchedule, FlowSchedule

    source, target = DiscreteSchedule(), FlowSchedule()
    t = torch.tensor([600.0], dtype=torch.float64)
    alpha, sigma = source.alpha_sigma(t)
    flow = translated(600.0, source, target)
    assert flow / (1 - flow) == pytest.approx(float(sigma / alpha))
    assert translated(flow, target, source) == 600.0


def test_a_swap_equals_loading_the_exported_file(tmp_path: Path):
    unet = tiny.backbone("sd15")
    first, second = random_adapter(unet, 0), random_adapter(unet, 1)
    live = loaded(tmp_path, (first, "default_0"))
    network, weights = live.unet, [id(p) for p in live.unet.parameters()]
    before = draw(live)
    swap(live, second)
    fresh = draw(loaded(tmp_path, (second, "default_0")))
    assert (draw(live) - fresh).abs().max() < 1e-5
    assert (before - fresh).abs().max() > 1e-2
    assert live.unet is network
    assert [id(p) for p in live.unet.parameters()] == weights


def test_a_point_of_a_space_is_swapped_in_and_weights_stay(tmp_path: Path):
    unet = tiny.backbone("sd15")
    layout = layout_of(unet)
    matrix = 0.3 * torch.randn(6, layout.size, generator=torch.Generator().manual_seed(2))
    space = WeightSpace.build(Population(layout, tuple("abcdef"), Stacked(matrix)))
    point = space.member("c")
    live = loaded(tmp_path, (random_adapter(unet, 0), "subject"))
    live.set_adapters("subject", 0.5)
    swap(live, point, name="subject")
    fresh = loaded(tmp_path, (point.adapter("exported"), "subject"))
    fresh.set_adapters("subject", 0.5)
    half = draw(fresh)
    assert (draw(live) - half).abs().max() < 1e-5
    fresh.set_adapters("subject", 1.0)
    assert (draw(fresh) - half).abs().max() > 1e-3


@pytest.mark.parametrize("rooted", [False, True])
def test_a_swap_divides_the_layers_own_scale_out(rooted: bool):
    """Layers of rank 4 and alpha 27 take a change of rank 1, padded; modules that it lacks no longer change."""
    pipeline = tiny.pipeline("sd15")
    full = random_adapter(pipeline.unet, 0)
    names = list(full.modules)
    adapter = Adapter({name: full.modules[name] for name in names[:-1]})
    config = LoraConfig(r=4, lora_alpha=27, use_rslora=rooted, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipeline.unet.add_adapter(config, "live")
    swap(pipeline, adapter, name="live")
    for name in names:
        layer = pipeline.unet.get_submodule(name)
        delta = layer.get_delta_weight("live")
        expected = adapter.modules[name].delta() if name in adapter.modules else torch.zeros_like(delta)
        assert torch.allclose(delta, expected, atol=1e-6)


def test_adapters_take_turns_in_half_precision_and_are_scaled_before_they_are_rounded():
    pipeline = tiny.pipeline("sd15")
    pipeline.unet.half()
    pipeline.unet.add_adapter(LoraConfig(r=1, lora_alpha=27, target_modules=["attn2.to_q"]), "live")
    live, name = LiveAdapter(pipeline, "live"), "mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
    layer = pipeline.unet.get_submodule(name)
    for value in (70_000.0, 1e-5):
        live.put(Adapter.from_factors({name: (torch.ones(1, 64), torch.full((64, 1), value))}))
        assert torch.equal(layer.lora_B["live"].weight, torch.full((64, 1), value / 27).half())
    pipeline.unet.delete_adapters("live")
    with pytest.raises(UserError, match="was deleted"):
        live.put(Adapter.from_factors({name: (torch.ones(1, 64), torch.ones(64, 1))}))


def test_what_cannot_be_swapped_leaves_the_pipeline_alone(tmp_path: Path):
    unet = tiny.backbone("sd15")
    adapter = random_adapter(unet, 0)
    live = loaded(tmp_path, (adapter, "alice"))
    before = [p.clone() for p in live.unet.parameters()]
    name = next(iter(adapter.modules))
    outputs, inputs = adapter.modules[name].shape
    wrong = Adapter.from_factors({name: (torch.zeros(1, inputs + 1), torch.zeros(outputs, 1))})
    other = Adapter.from_factors({"conv_in": (torch.zeros(1, 4, 3, 3), torch.zeros(32, 1))})
    text = Adapter(adapter.modules, text_encoders={"text_encoder": adapter.modules})
    with pytest.raises(UserError, match="no adapter 'bob'; it has alice"):
        swap(live, adapter, name="bob")
    with pytest.raises(IncompatibleModelError, match="cut the rank"):
        swap(live, random_adapter(unet, 1, rank=2), name="alice")
    with pytest.raises(IncompatibleModelError, match="has rank 1 and shape"):
        swap(live, Adapter({**adapter.modules, **wrong.modules}), name="alice")
    with pytest.raises(IncompatibleModelError, match="changes 'conv_in'"):
        swap(live, other, name="alice")
    with pytest.raises(IncompatibleModelError, match="text encoders"):
        swap(live, text, name="alice")
    assert all(torch.equal(a, b) for a, b in zip(before, live.unet.parameters(), strict=True))
    live.fuse_lora()
    with pytest.raises(UserError, match="unfuse_lora"):
        swap(live, adapter, name="alice")
