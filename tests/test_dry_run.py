"""`--dry-run` tells and does nothing, in every command of every script that offers it."""

import importlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from cyclopts import App
from PIL import Image

from diffcore.adapters import Adapter, write_adapter
from diffcore.cli import main
from diffcore.data import load_images
from diffcore.run import Run
from diffcore.testing import tiny
from immiscible_noise.coupling import Coupling
from immiscible_noise.study.settings import TrainSettings
from immiscible_noise.study.train import recipe_for

APPS = {
    "diffcore": "diffcore.cli.commands.app",
    "diffusion-featsel": "diffusion_featsel.app.cli",
    "emd-distill": "emd_distill.app.cli",
    "immiscible-noise": "immiscible_noise.app.cli",
    "nemo-localize": "nemo_localize.app.cli",
    "w2w-space": "w2w_space.app.cli",
}
FEATURE = "up-level1-repeat0-res-out"
# What each such command needs at least; a command that is not here fails the test that walks them.
WORDS = {
    "diffcore info": ["model", "--out", "page"],
    "diffcore sample": ["model", "a cat", "--steps", "2"],
    "diffcore metrics": ["images", "images"],
    "diffcore zoo samples": ["digits8-edm"],
    "diffcore zoo check": ["digits8-edm"],
    "diffcore zoo train": ["digits8-edm", "--steps", "2"],
    "diffusion-featsel score": ["model", "images"],
    "diffusion-featsel select": ["scored", "96ch"],
    "diffusion-featsel extract": ["model", "images", "--features", FEATURE],
    "diffusion-featsel correspond": ["model", "images/0.png", "images/1.png", "--features", FEATURE],
    "diffusion-featsel evaluate": ["model", "labelled", "--task", "segmentation", "--features", FEATURE],
    "diffusion-featsel probe": ["extracted", "labelled"],
    "emd-distill train": ["model", "--prompts", "captions.txt"],
    "emd-distill compare": ["model", "--prompts", "captions.txt"],
    "emd-distill sample": ["distilled", "a cat"],
    "emd-distill evaluate": ["distilled", "--prompts", "captions.txt"],
    "emd-distill correct": ["model", "--prompts", "a cat"],
    "emd-distill doctor": ["model", "--prompts", "a cat"],
    "emd-distill export": ["model", "distilled", "--out", "exported"],
    "immiscible-noise train": ["images", "--steps", "2"],
    "immiscible-noise evaluate": ["trained", "images"],
    "immiscible-noise compare": ["images", "--steps", "2"],
    "immiscible-noise diagnose": ["images"],
    "immiscible-noise plan": ["images"],
    "nemo-localize statistics": ["model", "captions.txt"],
    "nemo-localize calibrate": ["model", "captions.txt"],
    "nemo-localize detect": ["model", "captions.txt", "--calibration", "calibration.json", "--num-seeds", "2"],
    "nemo-localize localize": [
        "model",
        "captions.txt",
        "--statistics",
        "statistics",
        "--calibration",
        "calibration.json",
        "--num-seeds",
        "2",
    ],
    "nemo-localize generate": ["model", "captions.txt", "--neurons", "neurons.json"],
    "nemo-localize evaluate": ["model", "captions.txt", "--neurons", "neurons.json"],
    "nemo-localize verify": [
        "model",
        "captions.txt",
        "--neurons",
        "neurons.json",
        "--controls",
        "controls.txt",
        "--calibration",
        "calibration.json",
        "--num-seeds",
        "2",
    ],
    "nemo-localize audit": ["model", "captions.txt", "--references", "controls.txt"],
    "nemo-localize export": ["model", "neurons.json"],
    "w2w-space import": ["loras", "--model", "model", "--out", "imported"],
    "w2w-space build": ["population"],
    "w2w-space train": ["model", "labelled", "--prompt", "a toy"],
    "w2w-space invert": ["space", "model", "images/0.png", "--prompt", "a toy"],
    "w2w-space directions": ["space", "labels.csv"],
    "w2w-space evaluate": ["space"],
}


def commands(app: App, path: str) -> Iterator[tuple[str, App]]:
    """Yields every command with the words that call it."""
    for name in app:
        if name.startswith("-"):
            continue
        if app[name].default_command is None:
            yield from commands(app[name], f"{path} {name}")
        else:
            yield f"{path} {name}", app[name]


def offering() -> list[str]:
    """Returns the commands that have the option."""
    apps = {script: importlib.import_module(module).app for script, module in APPS.items()}
    return [
        words
        for script, app in apps.items()
        for words, command in commands(app, script)
        if any("--dry-run" in argument.names for argument in command.assemble_argument_collection())
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with what the commands read."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.pipeline("sd15").save_pretrained(folder / "model")
    (folder / "images").mkdir()
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        for part, array in (("images", pixels), ("masks", pixels[..., 0] // 128)):
            (folder / "labelled" / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / "labelled" / part / f"{number}.png")
    words = ["cat", "dog", "hat", "cup", "sea", "sky", "map", "pen", "box", "key", "owl", "bee"]
    (folder / "captions.txt").write_text("\n".join(f"a {word}" for word in words[:4]))
    (folder / "controls.txt").write_text("\n".join(f"the {word}" for word in words))
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
    for seed in range(3):
        factors = torch.full((1, 32), seed + 1.0), torch.randn(32, 1, generator=torch.Generator().manual_seed(seed))
        (folder / "loras").mkdir(exist_ok=True)
        write_adapter(Adapter.from_factors({layer: factors}), folder / "loras" / f"{seed}.safetensors")
    (folder / "labels.csv").write_text("adapter,attribute,value\n0,age,1\n1,age,2\n")
    (folder / "neurons.json").write_text(f'{{"{layer}": [1, 2]}}')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        few = ["--num-seeds", "2"]
        for words in (
            ["nemo-localize", "statistics", "model", "controls.txt", "--out", "statistics"],
            ["nemo-localize", "calibrate", "model", "controls.txt", "--out", "calibrated", *few],
            ["w2w-space", "import", "loras", "--model", "model", "--out", "population"],
            ["w2w-space", "build", "population", "--out", "space"],
            ["emd-distill", "train", "model", "--prompts", "captions.txt", "--steps", "1", "--out", "distilled"],
            ["diffusion-featsel", "score", "model", "images", "--filter", "none", "--out", "scored"],
            ["diffusion-featsel", "extract", "model", "images", "--features", FEATURE, "--out", "extracted"],
        ):
            assert main(importlib.import_module(APPS[words[0]]).app, words[1:]) == 0
        with Run.open(Path("trained"), command="immiscible-noise train", config={}, inputs={}) as run:
            run.save("recipe", {}, **asdict(recipe_for(load_images("images"), Coupling(), TrainSettings(), 0)))
        (folder / "calibrated" / "calibration.json").rename(folder / "calibration.json")
    return folder


def test_every_command_that_offers_it_is_walked():
    assert set(offering()) == set(WORDS)


@pytest.mark.parametrize("command", WORDS)
def test_a_dry_run_tells_and_does_nothing(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a dry run opened a run folder or ran a network")

    monkeypatch.chdir(folder)
    monkeypatch.setattr(Run, "open", refuse)
    monkeypatch.setattr("diffcore.denoiser.NetworkDenoiser.forward", refuse)
    before = sorted(folder.rglob("*"))
    script, *words = command.split()
    assert main(importlib.import_module(APPS[script]).app, [*words, *WORDS[command], "--dry-run"]) == 0
    assert capsys.readouterr().out.strip()
    assert sorted(folder.rglob("*")) == before
