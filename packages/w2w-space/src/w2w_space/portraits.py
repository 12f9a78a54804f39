"""The population of portraits: persons whose attributes are known exactly.

The base model `zoo:portraits-sd` draws portraits from text; each member is a rank-1 adapter that was trained on ten
pictures of one person, in ten poses before ten backgrounds, with one prompt for all. Each attribute takes its values
equally often, in an order of its own, so that attributes are hardly correlated; women have no beards. An oracle reads
attributes off a picture, and its features tell persons apart.
"""

import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import as_file, files
from importlib.resources.abc import Traversable
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from diffcore.errors import CorruptArtifactError
from diffcore.io import artifact
from diffcore.io.shipped import shipped_folder
from diffcore.metrics.attribute_network import load_attribute_network
from diffcore.models import DiffusionModel, load
from diffcore.noise import philox_uniform
from diffcore.runtime import Runtime
from diffcore.units import Map, each_unit
from diffcore.zoo.portraits.attributes import EYES, HAIRS, HAT_COLOURS, PARTS, SKINS, STYLES
from diffcore.zoo.portraits.draw import draw, draw_masks
from diffcore.zoo.portraits.people import People, identities, nuisances, portraits, select
from diffcore.zoo.portraits.pictures import SIZE
from w2w_space.instance import Instance
from w2w_space.labels import Labels
from w2w_space.layout import Layout
from w2w_space.population import Population, Stacked
from w2w_space.probe import ClassifierScorer
from w2w_space.recipe import Recipe
from w2w_space.train_population import Trained, train_population

MODEL = "zoo:portraits-sd"
ORACLE = "portraits-oracle"
PERSONS = 256
"""Number of persons among whom attributes are balanced."""
MEMBERS = 256
"""Number of members, which are the first of the persons: all of them."""
PICTURES = 10
PROMPT = "a portrait of a sks person"
SCHEMA = "w2w-space/portraits-population@1"
RECIPE = Recipe(
    targets=("to_q", "to_k", "to_v", "to_out.0", "time_emb_proj"),
    alpha=1.0,
    learning_rate=2e-2,
    steps=110,
    batch_size=4,
    betas=(0.9, 0.99),
    weight_decay=0.0,
    warmup=5,
    floor=0.05,
)
"""The recipe of the members."""

ATTRIBUTES: Mapping[str, tuple[str, tuple[float, ...]]] = {
    "man": ("gender", (0.0, 1.0)),
    "dark skin": ("skin", (0.0, 0.25, 0.5, 0.75, 1.0)),
    "hat": ("hat", (0.0, 1.0, 1.0)),
    "glasses": ("glasses", (0.0, 1.0, 1.0)),
    "beard": ("beard", (0.0, 1.0, 1.0)),
    "bald": ("style", (1.0, 0.0, 0.0, 0.0)),
    "long hair": ("style", (0.0, 0.0, 1.0, 0.0)),
    "curly hair": ("style", (0.0, 0.0, 0.0, 1.0)),
    "blond hair": ("hair", (0.0, 0.0, 1.0, 0.0, 0.0)),
    "red hair": ("hair", (0.0, 0.0, 0.0, 1.0, 0.0)),
    "grey hair": ("hair", (0.0, 0.0, 0.0, 0.0, 1.0)),
}
"""Attributes of a person: the class that each is about, and its value for each of that class's values."""

GUIDANCE = 2.0
"""Scale of guidance by which members draw."""

_ORDER_STREAM = 34
_STEPS = 16
_BACKGROUND = 0.95
# Shares in which a value is taken: half of the persons wear no hat, and so on.
_VALUES: Mapping[str, tuple[int, ...]] = {
    "gender": (0, 1),
    "skin": tuple(range(len(SKINS))),
    "hair": tuple(range(len(HAIRS))),
    "eye": tuple(range(len(EYES))),
    "style": tuple(range(len(STYLES))),
    "glasses": (0, 0, 1, 2),
    "beard": (0, 0, 1, 2),
    "hat": (0, 0, 1, 2),
    "hat_colour": tuple(range(len(HAT_COLOURS))),
}


def portrait_people(count: int = PERSONS, *, seed: int = 0) -> People:
    """Returns the persons of the population: every attribute takes its values equally often; women have no beards.

    Args:
        count: Number of persons to draw.
        seed: Seed of proportions and colours, and of the order in which each attribute takes its values.

    Example:
        >>> portrait_people(40)["skin"].bincount().tolist()
        [8, 8, 8, 8, 8]
    """
    people = identities(seed, range(count))
    order = philox_uniform(seed, range(len(_VALUES)), (count,), stream=_ORDER_STREAM).argsort(1)
    for (name, values), places in zip(_VALUES.items(), order, strict=True):
        column = torch.tensor(values).repeat(-(-count // len(values)))[:count]
        people[name] = column[places.argsort()]
    people["beard"] = people["beard"] * people["gender"]
    return people


def portrait_labels(people: People) -> Float[Tensor, "n attributes"]:
    """Returns the exact value of each of `ATTRIBUTES`, a column each, in [0, 1].

    Args:
        people: Persons, one row each.
    """
    return torch.stack([torch.tensor(values)[people[name]] for name, values in ATTRIBUTES.values()], 1)


def portrait_pictures(people: People, count: int = PICTURES, *, seed: int = 0) -> Float[Tensor, "n count 3 32 32"]:
    """Returns pictures of each person, every one in circumstances of its own.

    Args:
        people: Persons, one row each.
        count: Number of pictures of each person.
        seed: Seed of poses, lights and backgrounds; other seeds give new pictures of the same persons.
    """
    n = len(people["gender"])
    repeated = select(people, torch.arange(n).repeat_interleave(count))
    return draw(repeated | nuisances(1000 + seed, range(n * count)), SIZE).unflatten(0, (n, count))


def portrait_instances(
    model: DiffusionModel, people: People, count: int = PICTURES, *, seed: int = 0
) -> list[Instance]:
    """Returns one instance per person, with its pictures as latents and the prompt that all share.

    Args:
        model: Base model of the portraits, `zoo:portraits-sd`.
        people: Persons, one row each.
        count: Number of pictures of each person.
        seed: Seed of the circumstances in which pictures are taken.
    """
    assert model.prompts is not None  # a text-to-image model
    condition = dict(model.prompts([PROMPT]))
    found = []
    for number, pictures in enumerate(portrait_pictures(people, count, seed=seed)):
        found.append(Instance(f"person-{number:03d}", model.codec.encode(pictures), condition))
    return found


def train_portraits(
    model: DiffusionModel,
    *,
    count: int = MEMBERS,
    recipe: Recipe = RECIPE,
    group_size: int = 16,
    map: Map = each_unit,
) -> tuple[list[Trained], Float[Tensor, "n attributes"]]:
    """Trains the population and returns its members with their exact labels.

    Args:
        model: Base model, such as `load_portraits_base(training=True)`.
        count: Number of members to train, the first of the persons.
        recipe: Recipe of all members.
        group_size: Number of members that are trained together.
        map: Map over members that may keep what is finished.
    """
    people = select(portrait_people(), slice(count))
    instances = portrait_instances(model, people)
    return train_population(model, instances, recipe, group_size=group_size, map=map), portrait_labels(people)


def drawing_options(seeds: int = 4) -> dict[str, Any]:
    """Returns the arguments of `render` by which portraits are drawn: the prompt of the training, in 16 DDIM steps.

    Args:
        seeds: Number of pictures of each person.
    """
    times = torch.linspace(999, 0, _STEPS + 1, dtype=torch.float64).round()[:-1].float()
    return {"prompts": [PROMPT], "seeds": range(seeds), "timesteps": times, "guidance_scale": GUIDANCE}


def background_mask(count: int = 500) -> Float[Tensor, "32 32"]:
    """Returns where nearly all portraits show background: 1 there, 0 elsewhere.

    Args:
        count: Number of portraits that are looked at.
    """
    shown = draw_masks(portraits(7, range(count)), SIZE) == PARTS.index("background")
    return (shown.float().mean(0) > _BACKGROUND).float()


def load_portraits_base(*, training: bool = False) -> DiffusionModel:
    """Returns the base model that draws portraits from text, on the CPU.

    Args:
        training: Whether its network computes in bfloat16, which takes two thirds of the time; adapters that are
            trained stay in float32.
    """
    model = load(MODEL, runtime=Runtime(device="cpu"))
    if training:
        nn.Module.to(model.backbone, torch.bfloat16)  # the library's own warns of modules that it lists none of
    return model


def load_portraits_oracle() -> ClassifierScorer:
    """Returns the judge that reads `ATTRIBUTES` off portraits; the features of its network tell persons apart."""
    return ClassifierScorer(load_attribute_network(shipped_folder(ORACLE)), ATTRIBUTES)


def load_portraits() -> tuple[Population, Labels]:
    """Returns the population that comes with this package, and the exact labels of its members.

    Raises:
        CorruptArtifactError: The installed files are damaged.

    Example:
        >>> population, labels = load_portraits()
        >>> len(population), len(labels.attributes)
        (256, 11)
    """
    with as_file(files("w2w_space") / "portraits_population") as folder:
        stored = artifact.load(folder / "labels.safetensors", schema=SCHEMA)
        layout, names = Layout.from_json(stored.fields["layout"]), tuple(stored.fields["names"])
        if digest_of_files(folder / "adapters", names) != stored.fields["adapters"]:
            raise CorruptArtifactError(f"{folder / 'adapters'} is damaged; install w2w-space again")
        vectors = torch.stack(
            [_vector(layout, load_file(folder / "adapters" / f"{name}.safetensors")) for name in names]
        )
    labels = Labels(tuple(stored.fields["attributes"]), stored.tensors["labels"].double())
    return Population(layout, names, Stacked(vectors.float())), labels


def digest_of_files(folder: Traversable, names: Sequence[str]) -> str:
    """Returns the sha256 of the adapters of some members, in their order; missing files count as empty.

    Args:
        folder: Place of the adapters.
        names: Names of the members.
    """
    digest = hashlib.sha256()
    for name in names:
        path = folder / f"{name}.safetensors"
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def _vector(layout: Layout, tensors: Mapping[str, Tensor]) -> Tensor:
    """Returns the vector of an adapter in diffusers' names, whose alpha is its rank."""
    factors = [tensors[f"{layout.backbone}.{name}.lora_{side}.weight"] for name in layout.modules for side in "AB"]
    return torch.cat([factor.flatten() for factor in factors])
