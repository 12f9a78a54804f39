"""The second part of the demo: persons that a text-to-image model draws, edited and inverted.

Each claim is checked against attributes that are known exactly, by an oracle, and the page says which of the gates that
were set beforehand are met. Nothing is trained: the adapters come with the package.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from diffcore.models import DiffusionModel
from diffcore.run import Run
from diffcore.zoo.portraits.people import select
from w2w_space.diagnose import cross_fitted
from w2w_space.directions import Directions, find_directions
from w2w_space.edit import edit
from w2w_space.evaluate import EditScore, evaluate_edits
from w2w_space.invert import InversionSettings, invert
from w2w_space.labels import Labels
from w2w_space.population import Population
from w2w_space.portraits import (
    MEMBERS,
    background_mask,
    drawing_options,
    load_portraits,
    load_portraits_base,
    load_portraits_oracle,
    portrait_instances,
    portrait_people,
    portrait_pictures,
)
from w2w_space.probe import ClassifierScorer
from w2w_space.render import render, render_vectors
from w2w_space.sample import sample
from w2w_space.space import Point, WeightSpace

_HELD_OUT, _COMPONENTS = 32, 70  # as many components as vary more than permuted numbers do
_FITTED = MEMBERS - _HELD_OUT
_SUBJECTS, _SEEDS = 4, 2
_SLIDERS = ("hat", "glasses", "beard", "man", "dark skin", "bald", "long hair", "blond hair")
_STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 2.0)
_INJECTED_AT = (1000, 850, 700, 500, -1)
_INVERTED = 6
_JUDGED = 32
_GATES = {"accuracy": 0.8, "auc": 0.8, "effect": 0.4, "leak": 0.15, "own": 0.9}


def tour(run: Run) -> dict[str, Any]:
    """Builds the space of persons, keeps pictures and scores for the report, and returns what was found.

    Args:
        run: Run of the demo.
    """
    model, oracle = load_portraits_base(), load_portraits_oracle()
    population, labels = load_portraits()
    fitted = population.subset(range(_FITTED))
    whole = WeightSpace.build(fitted)
    space, _ = cross_fitted(whole, num_components=_COMPONENTS)
    known = Labels(labels.attributes, labels.values[:_FITTED])
    directions, normals = (find_directions(space, known, estimator=kind) for kind in ("conditional", "normal"))
    new = population.vectors.rows(range(_FITTED, len(population)))
    subjects = [space.project(population.layout.adapter(vector), unshrink=True) for vector in new]
    lacking = {
        name: [subjects[place] for place in (labels.values[_FITTED:, column] < 0.5).nonzero()[:_SUBJECTS, 0].tolist()]
        for column, name in enumerate(labels.attributes)
    }
    accuracy = _accuracy(model, oracle, population)
    scores = _keep_sliders(run, model, oracle, lacking, directions, normals)
    _keep_injection(run, model, lacking["hat"][0], directions)
    own = _keep_inversion(run, model, space, population)
    _keep_samples(run, model, space)
    auc = {row.name: row.auc for row in directions.rows}
    gates = _keep_gates(run, accuracy, auc, scores, own)
    return {
        "members": _FITTED,
        "components": _COMPONENTS,
        "accuracy": accuracy,
        "auc": auc,
        "effects": {row.name: {"effect": row.effect, "leak": row.leak, "into": row.leaked} for row in scores},
        "own_row_is_nearer_than": own,
        "gates_met": sum(gates.values()),
        "gates": len(gates),
    }


def _accuracy(model: DiffusionModel, oracle: ClassifierScorer, population: Population) -> dict[str, float]:
    """Returns the share of members whose pictures show each attribute as it was drawn, by their mean probabilities."""
    places = torch.linspace(0, len(population) - 1, _JUDGED).round().long()
    vectors = population.vectors.rows(places.tolist())
    drawn = render_vectors(model, population.layout, vectors, **drawing_options(_SEEDS)).flatten(1, 2)
    network = oracle.network
    with torch.no_grad():
        logits = network.logits(drawn.flatten(0, 1))
    people = select(portrait_people(), places)
    found = {}
    for head in ("hat", "hair", "style", "skin", "gender", "glasses", "beard"):
        read = logits[head].softmax(1).unflatten(0, drawn.shape[:2]).mean(1).argmax(1)
        found[head] = float((read == people[head]).float().mean())
    return found


def _keep_sliders(
    run: Run,
    model: DiffusionModel,
    oracle: ClassifierScorer,
    lacking: Mapping[str, Sequence[Point]],
    directions: Directions,
    normals: Directions,
) -> list[EditScore]:
    """Keeps each attribute's slider as pictures, and its effect, leak and identity; returns those of the default."""
    drawing: dict[str, Any] = drawing_options(_SEEDS)
    once: dict[str, Any] = {**drawing, "seeds": range(1)}
    subject = lacking["hat"][0]
    points = [edit(subject, {name: strength}, directions).point for name in _SLIDERS for strength in _STRENGTHS]
    run.save(
        "portraits-sliders",
        {"pictures": render(model, points, **once).flatten(0, 2)},
        names=list(_SLIDERS),
        strengths=list(_STRENGTHS),
        caption="One person that was not in the fit, moved along each direction, from the same noise.",
    )
    mask, rows, found = background_mask(), [], list[EditScore]()
    for name in _SLIDERS:
        paper = f"{name}, normal"
        both = Directions(directions.space, (directions[name], replace(normals[name], name=paper)))
        scored: dict[str, Any] = {"scored_as": {paper: name}, "strengths": 2.0, "mask": mask}
        scores = evaluate_edits(
            model, lacking[name], both, oracle, features=oracle.network.features, **scored, **drawing
        )
        own, normal = scores.rows
        others = [change for other, change in own.changes.items() if other != name]
        found.append(own)
        rows.append(
            {
                "slider": name,
                "held-out AUC": directions[name].auc,
                "effect": own.effect,
                "leak": own.leak,
                "into": own.leaked,
                "others, mean": sum(others) / len(others),
                "identity": own.identity,
                "of one, of two": f"{scores.same:.2f}, {scores.different:.2f}",
                "background": own.background,
                "effect, normal": normal.effect,
                "leak, normal": normal.leak,
            }
        )
    run.keep_table(
        "portraits-sliders",
        rows,
        f"Change of the oracle's probability by +2 standard deviations, mean of {_SUBJECTS} persons that were not in "
        f"the fit and lack the attribute, {_SEEDS} pictures each. Leak: mean absolute change of the other attribute "
        "that changed most; beside it that of all others. Normal: along the paper's direction. Identity: cosine of "
        "features before and after, from different noise, beside that of pictures of one person and of two. "
        "Background: mean absolute change where portraits show no person.",
    )
    return found


def _keep_injection(run: Run, model: DiffusionModel, subject: Point, directions: Directions) -> None:
    """Keeps pictures whose edit begins at different timesteps."""
    edited = edit(subject, {"hat": 2.5}, directions).point
    drawn = torch.stack(
        [
            render(model, [edited], original=[subject], timestep=timestep, **drawing_options(4))[0, 0]
            for timestep in _INJECTED_AT
        ]
    )
    before = drawn[-1]
    moved = [float((row - before).abs().mean()) for row in drawn]
    run.save(
        "portraits-injection",
        {"pictures": drawn.flatten(0, 1)},
        labels=[
            "edited from the start" if t >= 1000 else "not edited" if t < 0 else f"from T = {t}" for t in _INJECTED_AT
        ],
        columns=drawn.shape[1],
        caption="A hat, +2.5 standard deviations, of one person: edited weights at timestep T and below. Mean absolute "
        f"change of the pictures: {', '.join(f'{value:.3f}' for value in moved[:-1])}.",
    )


def _keep_inversion(run: Run, model: DiffusionModel, space: WeightSpace, population: Population) -> float:
    """Keeps persons found from one picture each; returns the share of the others that are farther than themselves."""
    places = list(range(_FITTED, _FITTED + _INVERTED))
    people = select(portrait_people(), torch.tensor(places))
    pictures = portrait_pictures(people, 1, seed=5)[:, 0]
    subjects = portrait_instances(model, people, 1, seed=5)
    found = invert(
        space, model, subjects, InversionSettings(num_components=space.num_components, steps=100, batch_size=4)
    )
    rows = torch.cat([space.members, space.coordinates(population.vectors.rows(range(_FITTED, len(population))))])
    z = torch.stack([point.z for point in found.points])
    cosines = torch.nn.functional.cosine_similarity(z[:, None], rows[None], dim=2)
    own = cosines[torch.arange(_INVERTED), torch.tensor(places)]
    nearer = float(((cosines < own[:, None]).float().sum(1) / (len(rows) - 1)).mean())
    options = drawing_options(2)
    drawn = render(model, found.points, **options)[:, 0]
    adapters = render_vectors(model, population.layout, population.vectors.rows(places), **options)[:, 0]
    shown = torch.cat([pictures, *drawn.unbind(1), *adapters.unbind(1)])
    run.save(
        "portraits-inversion",
        {"pictures": shown},
        labels=["the one picture", "found adapter", "found adapter", "own adapter", "own adapter"],
        columns=_INVERTED,
        caption=f"One picture each of {_INVERTED} persons that are not in the space, what the found adapters draw, and "
        "what adapters draw that were trained on ten pictures. Coordinates of a found person are more like those of "
        f"its own adapter than those of {nearer:.0%} of the other persons' (by cosine).",
    )
    return nearer


def _keep_samples(run: Run, model: DiffusionModel, space: WeightSpace, count: int = 4) -> None:
    drawn = sample(space, count, seed=1)
    points = [point for one in drawn for point in (one.point, space.member(one.nearest))]
    pictures = render(model, points, **drawing_options(4))[:, 0]
    run.save(
        "portraits-samples",
        {"pictures": pictures.flatten(0, 1)},
        labels=[label for one in drawn for label in (f"sample, {one.distance:.1f} sd from", one.nearest)],
        columns=pictures.shape[1],
        caption=f"{count} new persons, each above the member that is nearest to it, from the same noise.",
    )


def _keep_gates(
    run: Run, accuracy: Mapping[str, float], auc: Mapping[str, float], scores: Sequence[EditScore], own: float
) -> dict[str, bool]:
    """Keeps the gates with what was measured; returns which are met."""
    rows: list[dict[str, Any]] = []

    def gate(name: str, measured: float, bound: float, *, at_most: bool = False) -> None:
        met = measured <= bound if at_most else measured >= bound
        rows.append({"gate": name, "measured": measured, "bound": f"{'<=' if at_most else '>='} {bound:g}", "met": met})

    for name in ("hat", "hair", "style", "skin"):
        gate(f"members' pictures show their {name}", accuracy[name], _GATES["accuracy"])
    for name in _SLIDERS:
        gate(f"{name}: AUC of held-out members", auc[name], _GATES["auc"])
    for row in scores:
        gate(f"{row.name}: effect of +2 sd", row.effect, _GATES["effect"])
        gate(f"{row.name}: largest leak", row.leak, _GATES["leak"], at_most=True)
    gate("persons from one picture: share of others that are farther", own, _GATES["own"])
    told = [row | {"met": "met" if row["met"] else "not met"} for row in rows]
    run.keep_table("portraits-gates", told, "Bounds that were set before anything was measured.")
    return {row["gate"]: bool(row["met"]) for row in rows}
