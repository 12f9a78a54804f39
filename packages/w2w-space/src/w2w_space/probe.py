"""Labels by probing: each member draws pictures, and a classifier or a text-image model says what they show.

This makes attributes known of collected adapters that came without labels. The label of a
member is the mean score of its pictures, from the same prompts and noise for all members.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn import functional

from diffcore.digests import add_tensors, digest_of_values
from diffcore.errors import UserError, printable
from diffcore.metrics.attribute_network import AttributeNetwork
from diffcore.metrics.features import FeatureExtractor
from diffcore.models import DiffusionModel
from diffcore.units import Map, each_unit
from w2w_space.coordinates import Space
from w2w_space.labels import Labels
from w2w_space.render import render_vectors

_LEAST_SPREAD = 1e-6  # of scores, below which all members look alike


@runtime_checkable
class Scorer(Protocol):
    """Says how much pictures show of each attribute."""

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of the attributes."""
        ...

    @property
    def digest(self) -> str:
        """Digest of the network and of what is asked of it."""
        ...

    def __call__(self, images: Float[Tensor, "b c h w"]) -> Float64[Tensor, "b attributes"]:
        """Returns the score of each picture in [0, 1], a column for each attribute."""
        ...


@dataclass(frozen=True, eq=False)
class ClassifierScorer:
    """Scores by a network that classifies: the mean value of a head's classes, weighted by their probabilities.

    Attributes:
        network: Classifier with one head for each kind of class.
        values: For each attribute the head that tells it, and the value of each of its classes.

    Raises:
        UserError: The network has no such head, or a head has another number of classes.
    """

    network: AttributeNetwork
    values: Mapping[str, tuple[str, tuple[float, ...]]]

    def __post_init__(self) -> None:
        known = self.network.config.classes
        for name, (head, values) in self.values.items():
            if head not in known:
                raise UserError(f"the classifier has no {printable(head)!r}; it has {', '.join(known)}")
            if len(values) != len(known[head]):
                raise UserError(
                    f"{printable(name)!r} has {len(values)} values for the {len(known[head])} classes of {head!r}"
                )

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of the attributes."""
        return tuple(self.values)

    @property
    def digest(self) -> str:
        """Digest of the network and of the values of its classes."""
        weights = hashlib.sha256()
        add_tensors(weights, self.network.state_dict())
        asked = {name: [head, *values] for name, (head, values) in self.values.items()}
        return digest_of_values([weights.hexdigest(), asked])[:16]

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "b c h w"]) -> Float64[Tensor, "b attributes"]:
        """Returns the mean value of each attribute for each picture.

        Args:
            images: Pictures in [0, 1], any number of them.
        """
        device = next(self.network.parameters()).device
        found = list[Tensor]()
        for part in images.split(500):
            shown = {
                head: rows.double().softmax(1).cpu() for head, rows in self.network.logits(part.to(device)).items()
            }
            columns = [shown[head] @ torch.tensor(v, dtype=torch.float64) for head, v in self.values.values()]
            found.append(torch.stack(columns, 1))
        return torch.cat(found)


@dataclass(frozen=True, eq=False)
class TextScorer:
    """Scores by a text-image model: the probability that a picture shows the first of two texts.

    With the cosines c of the picture and both texts, the score is 1 / (1 + exp(100 (c_without - c_with))), as CLIP was
    trained to tell texts apart.

    Attributes:
        extractor: Image side of a CLIP, `clip:FOLDER`.
        text: Text side: function from texts to embeddings, such as `diffcore.metrics.prompt_fit.clip_text` returns.
        texts: For each attribute a text that describes it, and one that describes its absence.
    """

    extractor: FeatureExtractor
    text: Callable[[Sequence[str]], Tensor]
    texts: Mapping[str, tuple[str, str]]

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of the attributes."""
        return tuple(self.texts)

    @property
    def digest(self) -> str:
        """Digest of the network and of the texts."""
        return digest_of_values([self.extractor.sha256, {name: list(pair) for name, pair in self.texts.items()}])[:16]

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "b c h w"]) -> Float64[Tensor, "b attributes"]:
        """Returns the probability of each attribute for each picture.

        Args:
            images: Pictures in [0, 1], any number of them.
        """
        device = next(self.extractor.network.parameters()).device
        asked = self.text([text for pair in self.texts.values() for text in pair]).double().cpu()
        shown = torch.cat([self.extractor(part.expand(-1, 3, -1, -1).to(device)).cpu() for part in images.split(64)])
        cosines = functional.normalize(shown.double(), dim=1) @ functional.normalize(asked, dim=1).T
        return (100 * cosines).unflatten(1, (-1, 2)).softmax(2)[..., 0]


def classifier_values(
    network: AttributeNetwork, wanted: Sequence[str] = ()
) -> dict[str, tuple[str, tuple[float, ...]]]:
    """Returns what a classifier can be asked, by the names of attributes.

    A head whose first class is "none" asks whether there is any (hat); one of two classes asks for the second (man);
    others ask for each class but the first, which the others imply (blond hair).

    Args:
        network: Classifier with its classes.
        wanted: Names to choose; by default all.

    Raises:
        UserError: There is no such attribute.

    Example:
        >>> from diffcore.io.shipped import shipped_folder
        >>> from diffcore.metrics.attribute_network import load_attribute_network
        >>> oracle = load_attribute_network(shipped_folder("portraits-oracle"))
        >>> found = classifier_values(oracle, ["hat", "man", "blond hair"])
        >>> found["hat"], found["man"]
        (('hat', (0.0, 1.0, 1.0)), ('gender', (0.0, 1.0)))
    """
    found = dict[str, tuple[str, tuple[float, ...]]]()
    for head, classes in network.config.classes.items():
        if classes[0] == "none":
            found[head] = head, (0.0, *[1.0] * (len(classes) - 1))
        elif len(classes) == 2:
            found[classes[1]] = head, (0.0, 1.0)
        else:
            for place, name in enumerate(classes[1:], 1):
                found[f"{name} {head}"] = head, tuple(float(place == other) for other in range(len(classes)))
    for name in wanted:
        if name not in found:
            raise UserError(f"the classifier knows no {printable(name)!r}; it knows {', '.join(found)}")
    return {name: found[name] for name in wanted} if wanted else found


def probe(
    model: DiffusionModel,
    space: Space,
    scorer: Scorer,
    *,
    prompts: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    seeds: Sequence[int] = range(4),
    group_size: int = 16,
    map: Map = each_unit,
    **options: Any,
) -> tuple[Labels, list[str]]:
    """Returns the labels of a space's members from what they draw, and a sentence for each attribute that is left out.

    An attribute that all members show alike has no direction, and is left out.

    Args:
        model: Base model of the members.
        space: Space with its members, as its components hold them.
        scorer: Judge of the pictures.
        prompts: Prompts that every member draws; for class-conditional models give `labels`.
        labels: Classes that every member draws, in place of prompts.
        seeds: Seeds of the initial noise, the same for all members.
        group_size: Number of members whose pictures are scored together.
        map: Map over members that may keep what is finished.
        **options: More arguments of `diffcore.models.generate`.

    Raises:
        UserError: The space was written without its members, or they show all attributes alike.
    """
    if not len(space.members):
        raise UserError("the space was written without its members, which probing lets draw; build it with them")
    told = [space.fingerprint, model.fingerprint, scorer.digest, list(prompts or ()), list(labels or ()), list(seeds)]
    word = digest_of_values([*told, {name: str(value) for name, value in sorted(options.items())}])[:16]

    def work(unit: list[int]) -> list[Tensor]:
        vectors = space.vectors(space.members[unit])
        drawn = render_vectors(
            model, space.layout, vectors, prompts=prompts, labels=labels, seeds=seeds, **options
        ).flatten(1, 2)
        return list(scorer(drawn.flatten(0, 1)).unflatten(0, drawn.shape[:2]).mean(1))

    members = range(len(space.members))
    scores = torch.stack(map(work, members, name=f"probe-{word}", kind=Tensor, unit_size=group_size)).double()
    alike = (scores.std(0) < _LEAST_SPREAD).tolist()
    kept = [place for place, same in enumerate(alike) if not same]
    if not kept:
        raise UserError("the pictures of all members score alike; ask for other attributes, or check the prompt")
    left = [name for name, same in zip(scorer.attributes, alike, strict=True) if same]
    names = tuple(scorer.attributes[place] for place in kept)
    return Labels(names, scores[:, kept]), [f"{name!r} is the same for all members" for name in left]
