"""What more members and more components bring: the paper's figures 9, 10, 28 and 30, on the populations of w2w-space.

    python benchmarks/w2w_scaling.py [--population digits|portraits|all] [--quick] [--smoke]

Spaces are fitted to nested random parts of a population and judged by members that none has seen: how well their exact
labels are read from coordinates (R²), how much of their adapters' denoising gain is left after projection, and how well
subjects are found from one picture each. Digits: root mean square error of five style numbers, which an oracle reads
off ten digits. Portraits: cosine of the oracle's features with those of what the subjects' own adapters draw. `--quick`
leaves inversions out, which take most of the time; `--smoke` takes two small sizes and writes nothing.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffcore.io.jsonfile import write_json
from diffcore.zoo.digits.data import STYLES
from diffcore.zoo.portraits.people import select
from w2w_space.evaluate import recognised
from w2w_space.held_out import gain_kept
from w2w_space.instance import Instance
from w2w_space.invert import InversionSettings, invert
from w2w_space.labels import Labels
from w2w_space.portraits import (
    drawing_options,
    load_portraits,
    load_portraits_base,
    load_portraits_oracle,
    portrait_instances,
    portrait_people,
)
from w2w_space.render import render_vectors
from w2w_space.scaling import Scale, scaling, told
from w2w_space.space import WeightSpace
from w2w_space.styles import load_base, load_styles, read_styles, render_members, style_instances

RESULTS = Path(__file__).parent / "results" / "w2w-scaling.json"
SIZES, COMPONENTS = (16, 32, 64, 128), (1, 2, 5, 10, 20, 50, 100)
STEPS, INVERTED = 100, (20, 50)

Rows = list[dict[str, object]]


def _shown(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3f}" if value == value else "–"


class Study:
    """Rows of the result and lines of the page, one population after the other."""

    def __init__(self) -> None:
        self.rows: Rows = []
        self.lines: list[str] = []

    def value(self, name: str, value: float, unit: str = "") -> None:
        """Keeps a number for the result."""
        self.rows.append({"name": name, "value": value, "unit": unit})

    def table(self, heading: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Keeps a table for the page, and prints it."""
        lines = [f"### {heading}", "", f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
        lines += [f"| {' | '.join(_shown(x) for x in row)} |" for row in rows]
        print("\n".join(lines), flush=True)
        self.lines += [*lines, ""]


def members_table(study: Study, name: str, scales: Sequence[Scale], found: dict[int, float], judged: str) -> None:
    """Keeps what more members bring."""
    rows = []
    for scale in scales:
        spread = scale.r2.mean(1)
        rows.append(
            [
                scale.members,
                scale.components,
                f"{float(scale.r2.mean()):.2f} ({float(spread.min()):.2f} to {float(spread.max()):.2f})",
                float(scale.cosines.nanmean()),
                found.get(scale.members, "–"),
            ]
        )
        study.value(f"{name}, {scale.members} members: R² of held-out labels", float(scale.r2.mean()))
        study.value(f"{name}, {scale.members} members: mean |cosine| of directions", float(scale.cosines.nanmean()))
        if scale.members in found:
            study.value(f"{name}, {scale.members} members: {judged}", found[scale.members])
    columns = [
        "members",
        "components",
        "R² of held-out labels, mean (least to most of the parts)",
        "mean absolute cosine",
    ]
    study.table(f"{name}: more members", [*columns, judged], rows)


def components_table(study: Study, name: str, rows: Sequence[Sequence[Any]], judged: str) -> None:
    """Keeps what more components bring."""
    for row in rows:
        study.value(f"{name}, {row[0]} components: R² of held-out labels", float(row[1]))
        study.value(f"{name}, {row[0]} components: gain kept", float(row[2]))
    columns = ["components", "R² of held-out labels", "gain kept", "gain kept, best length", judged]
    study.table(f"{name}: more components", columns, rows)


def parted(count: int, judges: int) -> tuple[list[int], list[int]]:
    """Returns places of members to fit to, in random order, and of those that judge."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return order[judges:], order[:judges]


def digits(study: Study, *, smoke: bool, quick: bool) -> None:
    """The population of digits in 160 styles."""
    sizes, judges = ((16, 32), 4) if smoke else (SIZES, 8)
    model = load_base()
    for start, own in (("digits, shared A", False), ("digits, own A", True)):
        population, styles = load_styles(own=own)
        labels = Labels(STYLES, styles.double())
        scales = scaling(population, labels, sizes, held_out=32, parts=1 if smoke else 5)
        fitted, places = parted(len(population), judges)
        pictures = style_instances(styles, seed=5)
        subjects = [_one(pictures[place], number % 10) for number, place in enumerate(places)]

        def error(
            space: WeightSpace, m: int, subjects: list[Instance] = subjects, truth: Tensor = styles[places]
        ) -> float:
            points = invert(space.truncated(m), model, subjects, settings_of(m, smoke=smoke)).points
            read = read_styles(render_members(model, space.layout, torch.stack([p.vector for p in points])))
            return float((read - truth).square().mean().sqrt())

        spaces = {size: WeightSpace.build(population.subset(fitted[:size])) for size in sizes}
        found = {size: error(space, min(50, space.num_components)) for size, space in spaces.items() if not quick}
        members_table(study, start, scales, found, "error of styles found from one picture")
        largest = spaces[sizes[-1]]
        asked = [m for m in COMPONENTS if m <= largest.num_components][: 2 if smoke else None]
        new = [style_instances(styles, seed=9)[place] for place in places]
        vectors = population.vectors.rows(places)
        kept = gain_kept(largest, model, vectors, new, components=asked, num_pairs=8 if smoke else 32)
        rows = []
        for number, m in enumerate(asked):
            cut, members = largest.truncated(m), fitted[: sizes[-1]]
            r2 = told(cut.members, styles[members], cut.coordinates(vectors), styles[places])
            gains = kept.gain_kept[number]
            rows.append(
                [
                    m,
                    float(r2.mean()),
                    float(gains[0]),
                    float(gains.max()),
                    error(largest, m) if m in INVERTED and not quick else "–",
                ]
            )
        components_table(study, f"{start}, {sizes[-1]} members", rows, "error of styles found from one picture")


def portraits(study: Study, *, smoke: bool, quick: bool) -> None:
    """The population of persons that a text-to-image model draws."""
    sizes, judges = ((16, 32), 2) if smoke else ((16, 32, 64, 128), 8)
    model, oracle = load_portraits_base(), load_portraits_oracle()
    population, labels = load_portraits()
    scales = scaling(population, labels, sizes, parts=1 if smoke else 3, num_components=40)
    fitted, places = parted(len(population), judges)
    people = select(portrait_people(), torch.tensor(places))
    subjects = portrait_instances(model, people, 1, seed=5)
    vectors, options = population.vectors.rows(places), drawing_options(2)
    truth = render_vectors(model, population.layout, vectors, **options)

    def alike(space: WeightSpace, m: int) -> float:
        points = invert(space.truncated(m), model, subjects, settings_of(m, smoke=smoke)).points
        return float(recognised(model, points, truth, features=oracle.network.features, **options).mean())

    spaces = {size: WeightSpace.build(population.subset(fitted[:size])) for size in sizes}
    found = {size: alike(space, min(50, space.num_components)) for size, space in spaces.items() if not quick}
    members_table(study, "portraits", scales, found, "likeness of persons found from one picture")
    largest = spaces[sizes[-1]]
    asked = [m for m in COMPONENTS if m <= largest.num_components][: 2 if smoke else None]
    new = portrait_instances(model, people, 4, seed=9)
    kept = gain_kept(largest, model, vectors, new, components=asked, num_pairs=8 if smoke else 32)
    rows = []
    for number, m in enumerate(asked):
        cut, members = largest.truncated(m), [labels.values[place] for place in fitted[: len(largest.names)]]
        r2 = told(cut.members, torch.stack(members), cut.coordinates(vectors), labels.values[places])
        gains = kept.gain_kept[number]
        rows.append([m, float(r2.nanmean()), float(gains[0]), float(gains.max()), "–"])
    components_table(study, f"portraits, {len(largest.names)} members", rows, "likeness")


def settings_of(m: int, *, smoke: bool) -> InversionSettings:
    """Returns the settings of an inversion along so many components."""
    return InversionSettings(num_components=m, steps=5 if smoke else STEPS, batch_size=8, prior=0.0)


def _one(subject: Instance, digit: int) -> Instance:
    return Instance(subject.name, subject.x0[digit : digit + 1], {"class_labels": torch.tensor([digit])})


def main() -> int:
    """Prints and writes what more members and components bring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--population", choices=("digits", "portraits", "all"), default="all", help="which to study")
    parser.add_argument("--quick", action="store_true", help="no inversions")
    parser.add_argument("--smoke", action="store_true", help="two small sizes, nothing is written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    study = Study()
    if options.population in ("digits", "all"):
        digits(study, smoke=options.smoke, quick=options.quick)
    if options.population in ("portraits", "all"):
        portraits(study, smoke=options.smoke, quick=options.quick)
    if not options.smoke:
        write_json(RESULTS, study.rows)
        head = (
            "# What more members and more components bring\n\n"
            "Written by `benchmarks/w2w_scaling.py`. Spaces are judged by members that none has seen. Gain kept: share "
            "of\nthe denoising gain of their adapters on new pictures that is left after projection, as it is and "
            "lengthened to the\nbest of 1, 1.5 and 2. At most 20 components (40 for portraits) and half as many as "
            "members for R²; found from one\npicture along at most 50.\n\n"
        )
        RESULTS.with_suffix(".md").write_text(head + "\n".join(study.lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
