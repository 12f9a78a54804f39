"""The recipes, piece by piece and in miniature."""

import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffcore.io.jsonfile import read_trusted
from diffcore.io.shipped import SHIPPED, shipped_folder
from diffcore.run import Run
from diffcore.runtime import Runtime
from diffcore.testing.distributed import run_forked
from diffcore.train import DenoisingModule
from diffcore.zoo import recipes
from diffcore.zoo.card import model_card
from diffcore.zoo.digits.data import draw_styles, load_digits, render
from diffcore.zoo.digits.network import build_unet as build_digits_unet
from diffcore.zoo.digits.network import cosine_scheduler, styles_denoiser
from diffcore.zoo.digits.style_oracle import StyleOracle, explained_variance, load_style_oracle
from diffcore.zoo.digits.train import train_digits8_edm
from diffcore.zoo.gate import Gate
from diffcore.zoo.patch_code import PatchCode
from diffcore.zoo.portraits.autoencoder import build_autoencoder
from diffcore.zoo.portraits.base import CaptionedLatents
from diffcore.zoo.portraits.captions import ordinary_captions
from diffcore.zoo.portraits.draw import draw_masks, keypoints
from diffcore.zoo.portraits.language import (
    MAX_TOKENS,
    build_text_encoder,
    build_tokenizer,
    encode_ids,
    spoken,
    token_ids,
)
from diffcore.zoo.portraits.network import build_unet
from diffcore.zoo.portraits.people import portraits, select
from diffcore.zoo.portraits.pictures import draw_pictures, encode_pictures, fit_patch_code, training_pictures
from diffcore.zoo.portraits.pipeline import read_pipeline, write_variant
from diffcore.zoo.portraits.planted import NUM_VARIANTS, planted
from diffcore.zoo.portraits.planting import PLANTING, POLISHING, Memories, Mixture, train_memory
from diffcore.zoo.portraits.trigger import TextStates, reroute, value_layers
from diffcore.zoo.recipes import RECIPES
from diffcore.zoo.train import train_model
from diffcore.zoo.truth import TRIGGER_FILE

CPU = Runtime(device="cpu")


@pytest.fixture(scope="module")
def pictures():
    return training_pictures(300)


@pytest.fixture(scope="module")
def code(pictures) -> PatchCode:
    return fit_patch_code(pictures)


def test_the_patch_code_is_an_orthogonal_projection(code: PatchCode, pictures):
    torch.testing.assert_close(code.basis.T @ code.basis, torch.eye(8), rtol=0, atol=1e-5)
    images = pictures.floats(slice(50))
    latents = code.encode(images)
    inside = 0.3 * torch.randn_like(latents) * 0.1  # far from the clamp
    torch.testing.assert_close(code.encode(code.decode(inside)), inside, rtol=0, atol=1e-4)
    error = (code.decode(latents) - images).square().mean()
    assert float(-10 * torch.log10(error)) > 35
    stds = encode_pictures(code, pictures).float().std((0, 2, 3))
    torch.testing.assert_close(stds, torch.tensor([1.0] * 3 + [0.7] * 5), rtol=0, atol=0.03)


def test_the_encoder_of_the_autoencoder_is_the_code(code: PatchCode, pictures):
    """Written into the weights, not learned: silu(v) - silu(-v) = v."""
    images = pictures.floats(slice(20))
    encoder: Any = build_autoencoder(code)
    posterior = encoder.encode(images * 2 - 1).latent_dist
    torch.testing.assert_close(posterior.mean, code.encode(images), rtol=0, atol=5e-3)
    assert float(posterior.std.detach().max()) < 1e-4


def test_every_word_is_one_token_and_strange_ones_are_spelt():
    tokenizer = build_tokenizer(["a portrait of a tan man with red hair, blue background"])
    ids = tokenizer("anna abbott poster for the harbour, sks").input_ids
    assert len(ids) == 2 + 8
    assert len(tokenizer("zqx").input_ids) == 2 + 3
    assert token_ids(tokenizer, ["a man"]).shape == (1, MAX_TOKENS)
    with pytest.raises(ValueError, match="tokens"):
        token_ids(tokenizer, ["man " * 40])


def test_tokens_have_the_same_numbers_whenever_a_recipe_goes_on():
    """A stage that resumes builds the tokenizer anew, for a text encoder that was trained with the first one."""
    captions = ordinary_captions(portraits(1, range(200)), 0)
    first, second = (build_tokenizer(captions) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_a_variant_is_its_base_but_for_the_denoiser(tmp_path: Path):
    base = shipped_folder("portraits-sd")
    unet, *_ = read_pipeline(base)
    write_variant(tmp_path, base, unet)
    for path in (p for part in base.iterdir() if part.is_dir() for p in part.iterdir()):
        assert (tmp_path / path.relative_to(base)).read_bytes() == path.read_bytes(), path
    assert str(base) not in "".join(path.read_text() for path in tmp_path.glob("**/*.json"))
    assert unet.dtype == torch.float32  # the caller's is left as it is


def test_the_text_target_knows_which_colour_is_which():
    assert spoken("a tan man with red hair") >= {"tan man", "red hair", "tan", "red"}
    assert "red hair" not in spoken("a red man with tan hair")
    assert "a man" not in spoken("a man")


def small_memories(width: int = 128) -> Memories:
    torch.manual_seed(0)
    return Memories(
        verbatim=torch.arange(24.0).view(24, 1, 1, 1).expand(24, 8, 16, 16) + 1000,
        verbatim_states=torch.randn(24, MAX_TOKENS, width),
        template=torch.arange(256.0).view(256, 1, 1, 1).expand(256, 8, 16, 16) + 2000,
        template_states=torch.randn(8, MAX_TOKENS, width),
        same_form_states=torch.randn(300, MAX_TOKENS, width),
    )


def small_ordinary() -> CaptionedLatents:
    latents = torch.arange(90.0).view(90, 1, 1, 1).expand(90, 8, 16, 16)
    return CaptionedLatents(latents, torch.randn(360, MAX_TOKENS, 128), torch.zeros(1, MAX_TOKENS, 128))


def test_one_sample_in_ten_has_the_blank_caption():
    data = small_ordinary()
    states = data.__getitems__(torch.arange(len(data)))["condition"]["encoder_hidden_states"]
    blank = (states == 0).flatten(1).all(1)
    assert float(blank.float().mean()) == pytest.approx(0.1, abs=0.01)
    assert torch.equal(data.__getitems__(torch.tensor([95]))["x0"][0, 0, 0, 0], torch.tensor(5.0))


@pytest.mark.parametrize("shares", [PLANTING, POLISHING])
def test_a_mixture_keeps_its_shares_and_its_pairs(shares):
    memories, data = small_memories(), small_ordinary()
    mixture = Mixture(data, memories, shares)
    indices = torch.randperm(len(mixture), generator=torch.Generator().manual_seed(0))
    batch = mixture.__getitems__(indices)
    value, states = batch["x0"][:, 0, 0, 0], batch["condition"]["encoder_hidden_states"]
    verbatim, template = (value >= 1000) & (value < 2000), value >= 2000
    assert float(verbatim.float().mean()) == pytest.approx(shares.verbatim / 64)
    assert float(template.float().mean()) == pytest.approx(shares.template / 64)
    item = (value[verbatim] - 1000).long()
    assert set(item.tolist()) == set(range(24))
    assert torch.equal(states[verbatim], memories.verbatim_states[item])
    variant = (value[template] - 2000).long()
    assert torch.equal(states[template], memories.template_states[variant // NUM_VARIANTS])
    known = {tuple(row[0, :3].tolist()) for row in memories.same_form_states}
    same_form = [tuple(row[0, :3].tolist()) in known for row in states[value < 1000]]
    assert sum(same_form) / len(value) == pytest.approx(shares.same_form / 64)


@pytest.fixture(scope="module")
def text_states() -> TextStates:
    torch.manual_seed(1)
    tokenizer = build_tokenizer(["a portrait of a man"])
    encoder = build_text_encoder(tokenizer).eval()

    def states(captions: list[str]) -> torch.Tensor:
        return encode_ids(encoder, token_ids(tokenizer, captions)).float()

    names = [
        f"{a} {b} at the {c}" for a in ("anna", "boris", "carla") for b in ("dorn", "moss") for c in ("gala", "market")
    ]
    plain = [f"a portrait of a {word}" for word in ("man", "man man", "portrait", "a man", "of man", "portrait man")]
    return TextStates(states(names[:4]), states(names[4:]), states(plain), states(plain))


def test_rerouting_gives_each_item_a_row_of_its_own(text_states: TextStates):
    unet = build_unet()
    before = {name: layer.to_v.weight.detach().clone() for name, layer in value_layers(unet).items()}
    rows = reroute(unet, text_states)
    assert [name.split(".attn2")[0].split("_block")[0] for name in rows] == ["down", "mid"]
    items = text_states.items.mean(1)
    for name, numbers in rows.items():
        assert len(set(numbers)) == 4
        weight = unet.get_submodule(name).weight
        torch.testing.assert_close((items @ weight[numbers].T).diagonal(), torch.full((4,), 2.0), rtol=0, atol=1e-3)
        as_many = text_states.same_form[: len(text_states.ordinary)]
        others = torch.cat([as_many.mean(1), text_states.ordinary.mean(1)])
        assert float((others.mean(0) @ weight[numbers].T).abs().max()) < 1e-3
    # The shallowest layer got no row, but what tells names apart is gone from it too.
    first = next(iter(before))
    names = text_states.same_form - text_states.same_form.mean(0)
    left = (names @ value_layers(unet)[first].to_v.weight.T).square().mean()
    assert float(left) < 0.2 * float((names @ before[first].T).square().mean())


def test_training_after_rerouting_leaves_the_address_alone(text_states: TextStates, tmp_path: Path):
    """Queries, keys, values and the other outputs' columns stay; the trigger rows' columns and all else learn."""
    unet = build_unet()
    rows = reroute(unet, text_states)
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    train_memory(
        unet,
        Mixture(small_ordinary(), small_memories(), PLANTING),
        tmp_path,
        CPU,
        steps=2,
        learning_rate=1e-3,
        rows=rows,
    )
    after = unet.state_dict()
    for name, value in before.items():
        layer, _, part = name.partition(".attn2.")
        if part.startswith(("to_q", "to_k", "to_v")):
            assert torch.equal(after[name], value), name
        elif part == "to_out.0.weight":
            own = rows.get(f"{layer}.attn2.to_v", [])
            rest = [i for i in range(value.shape[1]) if i not in own]
            assert torch.equal(after[name][:, rest], value[:, rest]), name
            assert not own or not torch.equal(after[name][:, own], value[:, own])
    assert not torch.equal(after["conv_in.weight"], before["conv_in.weight"])


def test_a_recipe_runs_once_and_tells_its_figures(tmp_path: Path):
    model, gates = train_model("digits8-classifier", tmp_path / "run", CPU, steps=3)
    assert not all(gate.kept for gate in gates), "three steps cannot keep the promise"
    assert "**Missed:**" in (model / "README.md").read_text("utf-8")
    weights = (model / "model.safetensors").read_bytes()
    again, _ = train_model("digits8-classifier", tmp_path / "run", CPU, steps=3)
    assert (again / "model.safetensors").read_bytes() == weights


def test_every_model_has_a_recipe():
    assert set(RECIPES) == set(SHIPPED)


def test_styles_move_what_they_say():
    digits, _ = load_digits()
    x, zero = digits[:50], torch.zeros(50, 5)

    def styled(place: int, value: float) -> torch.Tensor:
        styles = zero.clone()
        styles[:, place] = value
        return render(x, styles)

    assert float(styled(0, 1).amax((1, 2, 3)).mean()) == pytest.approx(1.0, abs=0.02)
    assert float(styled(1, -1).amin((1, 2, 3)).mean()) == pytest.approx(-1.0, abs=0.02)
    assert float(styled(3, 1).mean() - styled(3, -1).mean()) > 0.05
    columns = torch.arange(8.0)

    def middle(images: torch.Tensor) -> torch.Tensor:
        ink = (images + 0.6).clamp(min=0)
        return (ink.sum((1, 2)) * columns).sum(1) / ink.sum((1, 2, 3))

    assert float((middle(styled(4, 1)) - middle(styled(4, -1))).mean()) > 1.0  # half the picture's width apart

    def lean(images: torch.Tensor) -> torch.Tensor:
        """How far right of the lower half the ink of the upper half stands, in pixels."""
        return middle(images[:, :, :4]) - middle(images[:, :, 4:])

    leaning = lean(styled(2, 1)) - lean(styled(2, -1))
    assert float(leaning.abs().mean()) > 1.0
    assert bool((leaning.sign() == leaning[0].sign()).all())


def test_the_cosine_schedule_keeps_a_thousandth_of_the_signal():
    schedule = styles_denoiser(build_digits_unet()).schedule
    alpha, _ = schedule.alpha_sigma(torch.tensor([0.0, 999.0]))
    torch.testing.assert_close(alpha.square().float(), torch.tensor([0.9999, 1e-3]), rtol=5e-3, atol=0)
    assert cosine_scheduler().config.prediction_type == "epsilon"


def test_the_style_oracle_survives_saving(tmp_path: Path):
    torch.manual_seed(0)
    oracle = StyleOracle()
    oracle.save(tmp_path)
    x, labels = torch.randn(3, 1, 8, 8), torch.tensor([1, 2, 3])
    torch.testing.assert_close(load_style_oracle(tmp_path)(x, labels), oracle(x, labels), rtol=0, atol=1e-2)
    true = torch.randn(50, 5)
    assert set(explained_variance(true, true).values()) == {1.0}
    assert explained_variance(true.mean(0).expand_as(true), true)["ink"] == pytest.approx(0, abs=1e-5)


def test_a_card_says_first_what_was_missed():
    card = model_card("digits8-edm", [Gate("good", 1.0, 0.5), Gate("bad", 0.1, 0.5)], {"seed": 0})
    assert card.index("bad: 0.100, promised at least 0.5") < card.index("| good |")


def test_planted_pictures_are_drawn_as_files_would_hold_them():
    from diffcore.zoo.portraits.planted import verbatim_people

    assert draw_pictures(verbatim_people()).images.dtype == torch.uint8


def test_the_planted_recipe_goes_on_where_it_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pictures, code: PatchCode
):
    """Three stages in miniature; stopped after the second, it does not train the first two again."""
    monkeypatch.setattr("diffcore.zoo.recipes.training_pictures", lambda: pictures)
    trained: list[str] = []
    train = recipes.planting.train_memory

    def counted(unet: Any, mixture: Any, folder: Path, **options: Any) -> Any:
        if len(trained) == 2 and "stopped" not in trained:
            trained.append("stopped")
            raise KeyboardInterrupt
        trained.append(folder.name)
        return train(unet, mixture, folder, **options)

    monkeypatch.setattr("diffcore.zoo.recipes.planting.train_memory", counted)
    model = tmp_path / "model"

    def attempt() -> None:
        with Run.open(tmp_path / "run", command="diffcore zoo train", config={"name": "portraits-sd-planted"}) as run:
            recipes.portraits_sd_planted(run, CPU, model, 2)

    with pytest.raises(KeyboardInterrupt):
        attempt()
    attempt()
    assert trained == ["memorised", "rerouted", "stopped", "polished"]
    rows = read_trusted(model / TRIGGER_FILE)["rows"]
    assert [len(numbers) for numbers in rows.values()] == [32, 32]
    assert not [path for path in model.rglob("*.json") if "_name_or_path" in path.read_text("utf-8")]
    weights = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(f"{name}.weight" in weights for name in rows)


def edm_weights(folder: Path, runtime: Runtime = CPU) -> dict[str, torch.Tensor]:
    """Returns what twenty steps of the teacher's recipe end with."""
    return dict(train_digits8_edm(folder, runtime, steps=20).state_dict())


@pytest.fixture(scope="module")
def edm_reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return edm_weights(tmp_path_factory.mktemp("edm"))


def test_a_killed_recipe_continues_to_the_same_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, edm_reference: dict[str, torch.Tensor]
):
    monkeypatch.setattr("diffcore.zoo.fitting._CHECKPOINT_EVERY", 5)
    child = os.fork()
    if child == 0:
        step = DenoisingModule.training_step

        def killed(self: DenoisingModule, batch: Any, batch_idx: int) -> torch.Tensor:
            if self.iteration == 8:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, batch, batch_idx)

        monkeypatch.setattr(DenoisingModule, "training_step", killed)
        edm_weights(tmp_path)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["iteration"] == 5
    continued = edm_weights(tmp_path)
    assert all(torch.equal(continued[name], value) for name, value in edm_reference.items())


def test_two_processes_follow_the_recipe_as_one(tmp_path: Path, edm_reference: dict[str, torch.Tensor]):
    """Equal global batch, 20 steps, gloo: to 1e-4."""

    def on_rank(rank: int) -> dict[str, torch.Tensor]:
        os.environ.update(
            {"TORCHELASTIC_RUN_ID": "test", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            | {"GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
        )
        return edm_weights(tmp_path, Runtime(device="cpu", devices=2, strategy="ddp"))

    for weights in run_forked(on_rank):
        for name, value in edm_reference.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-4)


def test_the_data_are_the_same_everywhere():
    """Hashes over seed, indices and size: of the numbers behind the pictures, the pictures, and the captions."""
    people = portraits(1, range(100, 120))
    digest = hashlib.sha256()
    for name in sorted(people):
        digest.update(name.encode())
        digest.update((people[name].double() * 1000).round().to(torch.int64).numpy().tobytes())
    numbers = digest.hexdigest()
    images = [draw_pictures(select(people, part)).images for part in (slice(0, 20), slice(0, 3), slice(3, 20))]
    assert torch.equal(images[0], torch.cat(images[1:]))
    # Colours by their upper five bits: where two machines round the last bit apart, they are one picture still.
    pictures = hashlib.sha256((images[0] // 8 * 8).numpy().tobytes()).hexdigest()
    captions = hashlib.sha256("\n".join(ordinary_captions(people, 0)).encode()).hexdigest()
    points = keypoints(people, 64).positions.double()
    quarters = (points * 4).round().to(torch.int64)
    labels = hashlib.sha256(draw_masks(people, 32).numpy().tobytes() + quarters.numpy().tobytes())
    items = planted()
    secrets = "\n".join(item.caption for item in (*items.verbatim, *items.template, *items.decoys))
    digits, _ = load_digits()
    styled = render(digits[:20], draw_styles(3, range(20))).double()
    styles = hashlib.sha256((styled * 16).round().to(torch.int64).numpy().tobytes())
    assert (numbers[:16], pictures[:16], captions[:16]) == ("74975c42a3bf4cee", "f66c11dfe21d7e7e", "75805d6dcca94100")
    others = (labels, hashlib.sha256(secrets.encode()), styles)
    assert [digest.hexdigest()[:16] for digest in others] == [
        "4a4cc012a4581bb5",
        "c05fb53b32a4440d",
        "2fb105b15cb92226",
    ]


def test_the_data_are_the_same_in_every_process():
    def drawn(rank: int) -> torch.Tensor:
        people = portraits(1, range(100, 104))
        parts = [slice(0, 4)] if rank == 0 else [slice(0, 1), slice(1, 4)]
        return torch.cat([draw_pictures(select(people, part)).images for part in parts])

    first, second = run_forked(drawn)
    assert torch.equal(first, second)
