"""The demo: 160 adapters of handwritten digits, one style each, become a space that is sampled, edited and inverted.

A second part does the same with persons that a text-to-image model draws; see `demo_portraits`.

The base model draws digits in all styles, an adapter in one; a style is five numbers, which an oracle reads off a
picture. So every claim can be checked against numbers that are known exactly. Nothing is trained: the adapters come
with the package, once with one initial A for all and once with an A of each one's own.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffcore.models import DiffusionModel
from diffcore.run import Run
from diffcore.runtime import Runtime
from diffcore.zoo.digits.data import STYLES
from w2w_space.app.demo_portraits import tour
from w2w_space.app.report import save_space_parts, write_page
from w2w_space.diagnose import cross_fitted, real_components
from w2w_space.directions import Directions, find_directions
from w2w_space.edit import edit
from w2w_space.gauge import GaugeKind
from w2w_space.instance import Instance
from w2w_space.invert import InversionSettings, invert
from w2w_space.labels import Labels
from w2w_space.layout import Layout
from w2w_space.population import Population
from w2w_space.sample import sample
from w2w_space.space import Point, WeightSpace
from w2w_space.styles import load_base, load_styles, read_styles, render_members, style_instances

_FITTED, _COMPONENTS, _SHOWN_DIGIT = 128, 20, 3
_CLEAR = (0.5, -0.5, 0.0, 0.0, 0.0)
_INVERTED = 50
_STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 2.0)
_LOOKED_AT = (1, 2, 3, 5, 8, 12, 20, 35, 60)
_GAUGES: tuple[GaugeKind, ...] = ("raw", "canonical")


def run_demo(out: Path, *, full: bool = False) -> dict[str, Any]:
    """Builds the space, samples, edits and inverts; returns the result, which `result.json` repeats.

    Args:
        out: Run folder; a finished demo is only read.
        full: Draw twelve samples instead of six, invert all new styles, and do the same with persons.
    """
    Runtime(device="cpu").apply_threads()
    model = load_base()
    inputs = {model.name: model.fingerprint}
    with Run.open(out, command="w2w-space demo", config={"full": full, "seed": 0}, inputs=inputs) as run:
        if run.finished:
            return run.result
        result = _toured(run, model, full=full)
        run.finish(result)
        write_page(run)
        return result


def _toured(run: Run, model: DiffusionModel, *, full: bool) -> dict[str, Any]:
    population, styles = load_styles()
    fitted = population.subset(range(_FITTED))
    whole = WeightSpace.build(fitted)
    real, limits = real_components(fitted, whole)
    space, shrinkage = cross_fitted(whole, num_components=_COMPONENTS)
    save_space_parts(run, whole, limits=limits)
    r2 = _keep_gauge(run, population, styles)
    write_page(run)
    _keep_samples(run, model, space, count=12 if full else 6)
    # A new subject of bright ink on dark ground, in which every change shows.
    clear = int((styles[_FITTED:] - torch.tensor(_CLEAR)).norm(dim=1).argmin()) + _FITTED
    subject = space.project(population.layout.adapter(population.vectors.rows([clear])[0]), unshrink=True)
    directions = find_directions(space, Labels(STYLES, styles[:_FITTED].double()))
    effects = _keep_sliders(run, model, subject, directions)
    inverted = _keep_inversion(run, model, whole.truncated(_INVERTED), styles, full=full)
    write_page(run)
    persons = tour(run) if full else None
    shared, own = min(r2["shared A, canonical"]), max(r2["own A, raw"])
    return {
        "answer": f"{_COMPONENTS} components of {_FITTED} adapters tell the five style numbers of new adapters (R² of "
        f"{shared:.2f} and more), and sliders move them one by one. From factors as they were written, adapters with "
        f"an initial A of their own tell nothing (R² of {own:.2f} at most); the canonical gauge gets "
        f"{min(r2['own A, canonical']):.2f} to {max(r2['own A, canonical']):.2f}.",
        "components": _COMPONENTS,
        "more_than_chance": real,
        "shrinkage": space.shrinkage,
        "shrinkage_by_components": dict(zip(map(str, shrinkage.components), shrinkage.ratios, strict=True)),
        "r2": r2,
        "effects": effects,
        "inversion": inverted,
        "portraits": persons,
        "held": shared >= 0.7 and own <= 0.1,
    }


def _keep_gauge(run: Run, population: Population, styles: Tensor) -> dict[str, list[float]]:
    """Keeps how well styles of new adapters are told, with and without the gauge; returns it at the demo's size."""
    curves, found = {}, {}
    for start, members in (("shared A", population), ("own A", load_styles(own=True)[0])):
        for gauge in _GAUGES:
            space = WeightSpace.build(members.subset(range(_FITTED)), gauge=gauge)
            new = members.vectors.rows(range(_FITTED, len(members)))
            told = {m: _told(space.truncated(m), new, styles) for m in _LOOKED_AT}
            curves[f"{start}, {gauge}"] = [max(float(told[m].mean()), -0.2) for m in _LOOKED_AT]
            found[f"{start}, {gauge}"] = [round(value, 3) for value in told[_COMPONENTS].tolist()]
    run.save(
        "gauge",
        {},
        components=list(_LOOKED_AT),
        errors=curves,
        y_label="R² of the styles of new adapters",
        caption=f"How well a linear map reads the five style numbers of {len(styles) - _FITTED} new adapters from "
        f"their coordinates, mean of five; fitted to {_FITTED} members. A member with an initial A of its own writes "
        "its change with factors of its own: a space of raw factors sees nothing else.",
    )
    rows = [{"adapters": name, **dict(zip(STYLES, values, strict=True))} for name, values in found.items()]
    run.keep_table("gauge", rows, f"R² of each style number of new adapters, from {_COMPONENTS} components.")
    return found


def _told(space: WeightSpace, new: Tensor, styles: Tensor) -> Tensor:
    """Returns R² of the styles of adapters that were not in the fit, read from coordinates by least squares."""
    known, wanted = styles[:_FITTED].double(), styles[_FITTED:].double()
    members, z = (torch.cat([x, torch.ones(len(x), 1)], 1).double() for x in (space.members, space.coordinates(new)))
    found = z @ torch.linalg.lstsq(members, known).solution
    return 1 - (found - wanted).square().sum(0) / (wanted - wanted.mean(0)).square().sum(0)


def _keep_samples(run: Run, model: DiffusionModel, space: WeightSpace, *, count: int) -> None:
    """Keeps new adapters and the members that are nearest to them, as pictures."""
    drawn = sample(space, count)
    points = [point for one in drawn for point in (one.point, space.member(one.nearest))]
    pictures = _pictures(model, space.layout, points)
    labels = [label for one in drawn for label in (f"sample, {one.distance:.1f} sd from", one.nearest)]
    copies = sum(one.near_copy for one in drawn)
    run.save(
        "samples",
        {"pictures": pictures},
        labels=labels,
        caption=f"{count} new adapters, each above the member that is nearest to it; {copies or 'none'} of them nearer "
        "to it than 99 % of the members are to one another. Ten digits each, from the same noise.",
    )


@dataclass(frozen=True)
class _Slider:
    """Style numbers that the oracle reads along one direction.

    Attributes:
        read: One row per strength, one column per style number.
        own: Column of the direction's own style number.
    """

    read: Tensor
    own: int

    @property
    def effect(self) -> float:
        """Change of the own number from one end to the other."""
        return float(self.read[-1, self.own] - self.read[0, self.own])

    @property
    def leak(self) -> float:
        """Largest change of another number from one end to the other."""
        change = (self.read[-1] - self.read[0]).abs()
        change[self.own] = 0
        return float(change.max())


def _keep_sliders(
    run: Run, model: DiffusionModel, subject: Point, directions: Directions
) -> dict[str, dict[str, float]]:
    """Keeps each attribute's slider as pictures and as what the oracle reads; returns effects and leaks."""
    layout, found, curves, pictures = subject.space.layout, dict[str, dict[str, float]](), {}, []
    for own, name in enumerate(STYLES):
        others = [other for other in STYLES if other != name]
        points = [edit(subject, {name: s}, directions).point for s in _STRENGTHS]
        kept = [edit(subject, {name: s}, directions, keep=others).point for s in _STRENGTHS]
        drawn = _pictures(model, layout, [*points, *kept])
        read = read_styles(2 * drawn - 1)
        plain, held = (_Slider(part, own) for part in read.split(len(_STRENGTHS)))
        pictures.append(drawn[: len(_STRENGTHS), _SHOWN_DIGIT])
        curves[name] = plain.read.T.tolist()
        found[name] = {
            "auc": directions[name].auc,
            "effect": plain.effect,
            "leak": plain.leak,
            "effect_keep": held.effect,
            "leak_keep": held.leak,
        }
    rows = [
        {
            "slider": name,
            "correlation": told["auc"],
            "effect": told["effect"],
            "leak": told["leak"],
            "effect, kept": told["effect_keep"],
            "leak, kept": told["leak_keep"],
        }
        for name, told in found.items()
    ]
    run.save(
        "sliders",
        {"pictures": torch.cat(pictures)},
        names=list(STYLES),
        strengths=list(_STRENGTHS),
        curves=curves,
        caption="One subject that was not in the fit, moved along each direction; strengths in standard deviations of "
        "the members.",
    )
    run.keep_table(
        "sliders",
        rows,
        f"Effect: change of the own style number, which goes from -1 to 1, from {_STRENGTHS[0]:g} to "
        f"{_STRENGTHS[-1]:+g} standard deviations, as the oracle reads it off the pictures; leak: largest change of "
        "another one; kept: with the others' scores held. Correlation: of held-out members' places with their styles.",
    )
    return found


def _keep_inversion(
    run: Run, model: DiffusionModel, space: WeightSpace, styles: Tensor, *, full: bool
) -> dict[str, float]:
    """Keeps what adapters draw that were found from one picture each, of styles that no member has."""
    wanted = styles[_FITTED:][: 32 if full else 8]
    subjects = []
    for place, made in enumerate(style_instances(wanted, seed=1)):
        digit = place % 10
        subjects.append(Instance(made.name, made.x0[digit : digit + 1], {"class_labels": torch.tensor([digit])}))
    settings = InversionSettings(num_components=space.num_components, steps=100, batch_size=8, prior=0.0)
    found = invert(space, model, subjects, settings)
    drawn = _pictures(model, space.layout, list(found.points))
    read, usual = read_styles(2 * drawn - 1), read_styles(2 * _pictures(model, space.layout, [space.point()]) - 1)
    digits = [int(subject.condition["class_labels"]) for subject in subjects[:8]]
    shown = [
        torch.stack([(subject.x0[0] + 1) / 2 for subject in subjects[:8]]),
        torch.stack([drawn[place, digit] for place, digit in enumerate(digits)]),
        torch.stack([drawn[place, (digit + 3) % 10] for place, digit in enumerate(digits)]),
    ]
    errors = {
        "rmse": float((read - wanted).square().mean().sqrt()),
        "rmse_of_mean": float((usual - wanted).square().mean().sqrt()),
    }
    run.save(
        "inversion",
        {"pictures": torch.cat(shown)},
        labels=["the one picture", "drawn by the found adapter", "another digit by it"],
        columns=len(digits),
        caption=f"One picture each of {len(wanted)} styles that no member has. The style numbers of what the found "
        f"adapters draw are off by {errors['rmse']:.2f} (root mean square over all ten digits); those of the mean "
        f"adapter by {errors['rmse_of_mean']:.2f}.",
    )
    return errors


def _pictures(model: DiffusionModel, layout: Layout, points: list[Point]) -> Tensor:
    """Returns ten digits of each point, in [0, 1] where they are not brighter or darker than any in the data."""
    drawn = render_members(model, layout, torch.stack([point.vector for point in points]))
    return (drawn + 1) / 2
