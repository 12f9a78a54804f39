"""The population of portraits on disk: as it comes with the package, and as a population that commands take.

It comes as one matrix in half precision with its table, a row of 15 kB for each member, instead of a file for each,
whose header alone would take another 10 kB; each member is written as an ordinary LoRA in one call.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from diffcore.io import artifact
from diffcore.io.jsonfile import write_text
from diffcore.models import DiffusionModel
from w2w_space.files.population import LABELS, Member, PopulationFolder
from w2w_space.portraits import ATTRIBUTES, RECIPE, SCHEMA, load_portraits
from w2w_space.recipe import layout_for
from w2w_space.train_population import Trained, population_of


def store_portraits(model: DiffusionModel, members: Sequence[Trained], labels: Tensor, path: Path) -> Path:
    """Writes trained members as they come with the package, and returns the file.

    Args:
        model: Base model that they were trained on.
        members: Members as `train_portraits` returns them.
        labels: Their exact labels, one row each.
        path: File that ends in .safetensors.
    """
    population = population_of(layout_for(model, RECIPE.targets, RECIPE.rank), members)
    kept = [place for place, member in enumerate(members) if not member.failed]
    return artifact.save(
        path,
        {"vectors": population.vectors.rows(range(len(population))).half(), "labels": labels[kept].float()},
        schema=SCHEMA,
        layout=population.layout.to_json(),
        names=list(population.names),
        attributes=list(ATTRIBUTES),
        recipe=RECIPE.to_json(),
        loss=sum(members[place].loss for place in kept) / len(kept),
        base_loss=sum(members[place].base_loss for place in kept) / len(kept),
    )


def write_portraits(model: DiffusionModel, folder: Path | str) -> PopulationFolder:
    """Writes the members that come with the package as a population for `build`, with their labels beside it.

    Args:
        model: Base model of the members, `zoo:portraits-sd`.
        folder: Place of the population; `labels.csv` in it is for `directions`.

    Raises:
        UserError: The folder holds a population already.
    """
    population, labels = load_portraits()
    made = PopulationFolder.create(folder, population.layout, model.adapter_base, dtype="float16")
    found = made.append(population.vectors.rows(range(len(population))), [Member(name) for name in population.names])
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["adapter", *labels.attributes])
    rows.writerows(
        [name, *map(_short, values)] for name, values in zip(population.names, labels.values.tolist(), strict=True)
    )
    write_text(Path(folder) / LABELS, text.getvalue())
    return found


def _short(value: float) -> str:
    return f"{value:g}"
