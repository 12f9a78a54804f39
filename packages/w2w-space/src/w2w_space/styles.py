"""The population of handwritten digits in 160 styles, on which the whole method can be seen.

The base model `zoo:digits-styles` draws digits in all styles, which are five numbers in [-1, 1]; each member is a
rank-1 adapter that was trained on ten digits of one style. Styles are spread evenly: each number takes the 160 middles
of equal slices once, in an order of its own, so that half of the members lie on either side of 0. An oracle reads the
five numbers off a picture.
"""

from dataclasses import replace
from importlib.resources import as_file, files

import torch
from jaxtyping import Float
from torch import Tensor

from diffcore.denoiser import sample
from diffcore.io import artifact
from diffcore.io.shipped import shipped_folder
from diffcore.models import DiffusionModel, load
from diffcore.noise import philox_uniform, row_noise
from diffcore.runtime import Runtime
from diffcore.units import Map, each_unit
from diffcore.zoo.digits.data import DIGITS, STYLES, load_digits, render
from diffcore.zoo.digits.style_oracle import load_style_oracle
from w2w_space.bank import bank
from w2w_space.instance import Instance
from w2w_space.layout import Layout
from w2w_space.population import Population, Stacked
from w2w_space.recipe import Recipe
from w2w_space.train_population import Trained, train_population

MODEL = "zoo:digits-styles"
MEMBERS = 160
SCHEMA = "w2w-space/styles-population@1"
RECIPE = Recipe(
    targets=("to_q", "to_k", "to_v", "to_out.0"),
    alpha=1.0,
    learning_rate=1e-2,
    steps=80,
    batch_size=8,
    betas=(0.9, 0.99),
    weight_decay=0.0,
    warmup=5,
    floor=0.05,
)
"""The recipe of the members; with `init="own"` for those that do not share their initial A."""

_STYLE_STREAM, _DIGIT_STREAM = 32, 33
_CLIP = 1.2


def style_labels(count: int = MEMBERS, *, seed: int = 0) -> Float[Tensor, "n 5"]:
    """Returns the styles of the members: ink, background, slant, thickness and shift, balanced and in [-1, 1].

    Args:
        count: Number of styles to draw.
        seed: Seed of the order in which each number takes its values.

    Example:
        >>> style_labels(4).sort(0).values[:, 0].tolist()
        [-0.75, -0.25, 0.25, 0.75]
    """
    order = philox_uniform(seed, range(len(STYLES)), (count,), stream=_STYLE_STREAM).argsort(1).T
    return (2 * order + 1) / count - 1


def style_instances(styles: Float[Tensor, "n 5"], *, seed: int = 0) -> list[Instance]:
    """Returns one instance per style: one digit of each of the ten classes, drawn at random.

    Args:
        styles: Style numbers of the instances in [-1, 1].
        seed: Seed by which digits are chosen; other seeds give other pictures of the same styles.

    Raises:
        MissingDependencyError: scikit-learn, which carries the digits, is not installed.

    Example:
        >>> style_instances(style_labels(2))[1].x0.shape
        torch.Size([10, 1, 8, 8])
    """
    images, labels = load_digits()
    classes = [(labels == digit).nonzero()[:, 0] for digit in range(len(DIGITS))]
    u = philox_uniform(seed, range(len(styles)), (len(DIGITS),), stream=_DIGIT_STREAM)
    found = []
    for row, style in enumerate(styles):
        chosen = torch.stack([of[int(u[row, digit] * len(of))] for digit, of in enumerate(classes)])
        x0 = render(images[chosen], style.expand(len(DIGITS), -1))
        found.append(Instance(f"style-{row:03d}", x0, {"class_labels": torch.arange(len(DIGITS))}))
    return found


def train_styles(
    model: DiffusionModel, *, own: bool = False, count: int = MEMBERS, group_size: int = 32, map: Map = each_unit
) -> tuple[list[Trained], Float[Tensor, "n 5"]]:
    """Trains the population and returns its members with their exact styles; all 160 take minutes on one core.

    Args:
        model: Base model of digits in all styles, `zoo:digits-styles`.
        own: Whether each member starts from its own A instead of a shared one.
        count: Number of members to train.
        group_size: Number of members that are trained together.
        map: Map over members that may keep what is finished.
    """
    styles = style_labels(count)
    recipe = replace(RECIPE, init="own") if own else RECIPE
    return train_population(model, style_instances(styles), recipe, group_size=group_size, map=map), styles


def load_base() -> DiffusionModel:
    """Returns the base model of digits in all styles, on the CPU."""
    return load(MODEL, runtime=Runtime(device="cpu"))


def load_styles(*, own: bool = False) -> tuple[Population, Float[Tensor, "n 5"]]:
    """Returns the population that comes with this package, and the exact style of each member.

    Args:
        own: Whether to return the members that started from an A of their own, instead of a shared one.

    Raises:
        CorruptArtifactError: The installed file is damaged.

    Example:
        >>> population, styles = load_styles()
        >>> len(population), population.layout.size, tuple(styles.shape)
        (160, 2816, (160, 5))
    """
    name = f"{'own' if own else 'shared'}.safetensors"
    with as_file(files("w2w_space") / "styles_population") as folder:
        stored = artifact.load(folder / name, schema=SCHEMA)
    vectors, labels = stored.tensors["vectors"].float(), stored.tensors["labels"].float()
    layout, names = Layout.from_json(stored.fields["layout"]), tuple(stored.fields["names"])
    return Population(layout, names, Stacked(vectors)), labels


@torch.no_grad()
def render_members(
    model: DiffusionModel,
    layout: Layout,
    vectors: Float[Tensor, "n size"],
    *,
    per_class: int = 1,
    seed: int = 0,
    steps: int = 20,
    group_size: int = 32,
) -> Float[Tensor, "n pictures 1 8 8"]:
    """Returns digits of all ten classes from each adapter, all from the same noise, in model space.

    The shape of a digit, which the noise decides, shifts what the oracle reads by up to .4; several digits of each
    class make readings steadier.

    Args:
        model: Base model of digits in all styles.
        layout: Table of the vectors.
        vectors: Vectors of the adapters to draw with.
        per_class: Number of digits of each class; the classes 0 to 9 follow one another, round after round.
        seed: Seed of the noise from which each picture starts.
        steps: Number of DDIM steps for each picture.
        group_size: Number of adapters that are drawn with together.
    """
    labels = torch.arange(len(DIGITS), device=model.device).repeat(per_class)
    noise = row_noise(seed, range(len(labels)), model.shape, device=model.device)
    done = []
    for group in vectors.to(model.device).split(group_size):
        with bank(model.backbone, layout, group):
            cond = {"class_labels": labels.repeat(len(group))}
            drawn = sample(model.denoiser, noise.repeat(len(group), 1, 1, 1), cond, steps=steps, clip_x0=_CLIP)
        done.append(drawn.view(len(group), len(labels), *model.shape))
    return torch.cat(done)


@torch.no_grad()
def read_styles(pictures: Float[Tensor, "n pictures 1 8 8"]) -> Float[Tensor, "n 5"]:
    """Returns the mean style that the oracle reads off the digits of each adapter.

    Args:
        pictures: Digits in model space, classes 0 to 9 round after round, as `render_members` returns them.
    """
    oracle = load_style_oracle(shipped_folder("digits-styles-oracle"))
    count = pictures.shape[1]
    labels = torch.arange(count).remainder(len(DIGITS)).repeat(len(pictures))
    return oracle(pictures.flatten(0, 1).cpu(), labels).view(len(pictures), count, -1).mean(1)
