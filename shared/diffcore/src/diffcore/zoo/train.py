"""Trains a model of the zoo, measures it, and writes its card; `diffcore zoo train NAME` calls it."""

from pathlib import Path

from diffcore.io.files import make_folder
from diffcore.io.jsonfile import write_text
from diffcore.report import image_grid
from diffcore.run import Run
from diffcore.run.record import versions
from diffcore.runtime import Runtime
from diffcore.zoo.card import model_card
from diffcore.zoo.check import check
from diffcore.zoo.gate import Gate
from diffcore.zoo.recipes import RECIPES
from diffcore.zoo.show import samples


def train_model(
    name: str, out: Path, runtime: Runtime, *, steps: int | None = None, restart: bool = False
) -> tuple[Path, list[Gate]]:
    """Trains, or goes on training, and returns the finished model's folder with its gates.

    Args:
        name: A model listed in `shipped.SHIPPED`.
        out: Run folder; the model is written to its sub-folder `model`.
        runtime: Device, precision and seed of the training.
        steps: Steps of the longest training stage; by default the recipe's own number.
        restart: Whether an earlier run is put aside.
    """
    recipe, usual = RECIPES[name]
    config = {"name": name, "steps": steps or usual, "seed": runtime.seed, "dtype": runtime.dtype}
    with Run.open(out, command="diffcore zoo train", config=config, restart=restart) as run:
        model = run.folder / "model"
        make_folder(model)
        recipe(run, runtime, model, steps or usual)
        if not run.leading:
            return model, []
        gates = check(name, model, Runtime(device=runtime.device, threads=runtime.threads))
        made = {**config, "versions": versions("diffcore")}
        write_text(model / "README.md", model_card(name, gates, made))
        images, columns, _ = samples(name, model, Runtime(device=runtime.device, threads=runtime.threads))
        image_grid(images, columns=columns).savefig(model / "samples.png")
        run.finish({gate.name: gate.value for gate in gates} | {"missed": [g.name for g in gates if not g.kept]})
    return model, gates
