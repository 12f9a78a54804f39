"""The report of a run, made from whatever its folder holds; it can be made again at any time."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from diffcore.report import Report, lines_with_band
from diffcore.report.figures import Series
from diffcore.run import Run
from diffusion_featsel.activation import Activation
from diffusion_featsel.app.figures import network_map, scatter
from diffusion_featsel.app.pictures import component_sheet, match_strips, principal_colors
from diffusion_featsel.app.words import SCORES, TITLES, worded
from diffusion_featsel.files.ranking import FILE as RANKING
from diffusion_featsel.files.ranking import read_ranking
from diffusion_featsel.ranking import Ranking

_SHOWN = ("reliability", "position_share", "noise_leak")  # columns beside the score; the CSV has all
_SHEET = 120  # activations on the sheet of components
_OF_RANKINGS = (
    "The ranking without labels is a guess: how well it agrees with labels was measured on small models, as the "
    "benchmarks say, and for the paper's models it can be compared with the paper's tables by --against-paper.",
    "An activation that holds the position of a place more than its content looks good on aligned images. Position "
    "share stands beside each score for this reason.",
)
_LIMITS = (
    "Features hold where a thing is in the image as well as what it is; on aligned images, both look alike.",
    "Noise, timestep, prompt and resizing change features. Numbers of different settings do not compare.",
)


def save_components(
    run: Run, image: Tensor, colors: Mapping[str, Tensor], dropped: Sequence[str] = (), *, caption: str = ""
) -> None:
    """Keeps one image with the principal components of its activations for the report.

    Args:
        run: Run that the report is about.
        image: The image in [0, 1].
        colors: Components of each activation as colors, by name.
        dropped: Names that are written in grey.
        caption: Sentence below the pictures, where they are not the activations of one image.
    """
    tensors = {name: picture.contiguous() for name, picture in colors.items()}
    run.save(
        "components",
        {**tensors, "image": image.contiguous()},
        names=list(tensors),
        dropped=list(dropped),
        caption=caption,
    )


def save_strips(run: Run, strips: Sequence[Mapping[str, Tensor]], caption: str) -> None:
    """Keeps matched points of some pairs of images for the report.

    Args:
        run: Run that the report is about.
        strips: For each pair the images `source` and `target`, `points`, `found`, and `correct` where it is known.
        caption: Sentence below the pictures.
    """
    flat = {f"{place}/{key}": value.contiguous() for place, strip in enumerate(strips) for key, value in strip.items()}
    run.save("strips", flat, count=len(strips), caption=caption)


def components_of(maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the principal components of one image's maps as colors.

    Args:
        maps: Maps (1, c, h, w) by name.
    """
    return {name: principal_colors(tensor)[0] for name, tensor in maps.items()}


def write_page(run: Run) -> Path:
    """Writes `report.html` and its figures from the parts of a run, whichever there are.

    Args:
        run: Run that the report is about.
    """
    verb = str(run.record["command"]).split()[-1]
    report = Report(TITLES.get(verb, "diffusion-featsel"), run)
    if run.finished:
        report.answer(str(run.result.get("answer", "")))
    ranking, dropped = None, {}
    if (run.folder / RANKING).exists():
        ranking, filtered, _ = read_ranking(run.folder / RANKING)
        dropped = {} if filtered is None else dict(filtered.dropped)
    _add_strips(report, run)
    if ranking is not None:
        _add_map(report, run, ranking, dropped)
    _add_agreement(report, run, ranking)
    _add_choice(report, run)
    for name in ("stored", "sets", "copies", "tasks", "scores", "paper", "correlations"):
        report.kept_table(name, TITLES.get(f"table-{name}", name.capitalize()), worded)
    _add_components(report, run)
    if ranking is not None:
        _add_ranking(report, ranking, dropped)
    report.section("What may not be concluded").points(
        *(_LIMITS if ranking is None and not run.has("choice") else (*_OF_RANKINGS, _LIMITS[-1]))
    )
    return report.save()


def _add_map(report: Report, run: Run, ranking: Ranking, dropped: Mapping[str, str]) -> None:
    report.section("The network, activation by activation")
    values = {row.name: float(value) for row in ranking.rows if (value := getattr(row, ranking.default)) is not None}
    activations: list[Activation] = [row.activation for row in ranking.rows]
    figure = network_map(activations, values, dropped, label=SCORES[ranking.default])
    report.plot(
        "network",
        figure,
        f"Score of each activation without labels, {ranking.num_images} images, timestep {ranking.t:g}. Rows are the "
        "network's modules in the order of execution, with lines between its stages; crossed out is what the filter "
        "drops, grey what has no score.",
    )


def _add_agreement(report: Report, run: Run, ranking: Ranking | None) -> None:
    """Adds the comparison of scores without labels with true ones."""
    if ranking is None or not run.has("truth"):
        return
    truth = run.load("truth").fields
    values = {row.name: float(value) for row in ranking.rows if (value := getattr(row, ranking.default)) is not None}
    report.section("Does the ranking without labels hold?")
    for task, measured in truth["tasks"].items():
        stages: dict[str, tuple[list[float], list[float]]] = {}
        for row in ranking.rows:
            if row.name in values and row.name in measured:
                x, y = stages.setdefault(f"{row.activation.stage} stage", ([], []))
                x.append(values[row.name])
                y.append(measured[row.name])
        best = max(measured, key=lambda name: measured[name])
        marked = {best: (values[best], measured[best])} if best in values else {}
        figure = scatter(stages, x_label=SCORES[ranking.default], y_label=truth["labels"][task], marked=marked)
        report.plot(f"agreement-{task}", figure, truth["captions"][task])


def _add_choice(report: Report, run: Run) -> None:
    if not run.has("choice"):
        return
    part = run.load("choice").fields
    report.section("The chosen set").table(worded(part["rows"]), part["caption"])
    if len(part.get("curve", ())) > 1:
        x = [point["cost"] for point in part["curve"]]
        figure = lines_with_band(
            [Series("chosen one after the other", x, [point["value"] for point in part["curve"]])],
            x_label=part["cost_label"],
            y_label=part["value_label"],
        )
        report.plot("budget", figure, part["curve_caption"])


def _add_strips(report: Report, run: Run) -> None:
    if not run.has("strips"):
        return
    part = run.load("strips")
    report.section("Matched points")
    strips: list[dict[str, Tensor]] = [{} for _ in range(part.fields["count"])]
    for key, value in part.tensors.items():
        place, name = key.split("/")
        strips[int(place)][name] = value
    report.plot("matches", match_strips(strips), part.fields["caption"])


def _add_components(report: Report, run: Run) -> None:
    if not run.has("components"):
        return
    part = run.load("components")
    shown = {_short(name): part.tensors[name] for name in part.fields["names"][:_SHEET]}
    figure = component_sheet(part.tensors["image"], shown, [_short(name) for name in part.fields["dropped"]])
    report.section("What each activation sees")
    report.plot(
        "components",
        figure,
        part.fields.get("caption")
        or "The first three principal components of each activation of one image, as red, green and blue, in the "
        "order of execution; each tile is scaled for itself.",
    )


def _add_ranking(report: Report, ranking: Ranking, dropped: Mapping[str, str]) -> None:
    report.section("All activations, best first")
    order = {name: place for place, name in enumerate(ranking.scores(ranking.default))}
    rows = sorted(ranking.rows, key=lambda row: order.get(row.name, len(order)))
    table = [
        {
            "activation": row.name,
            **{name: _rounded(getattr(row, name)) for name in (ranking.default, *_SHOWN)},
            "shape": "x".join(map(str, (row.activation.channels, *(row.activation.grid or ())))),
            "cost": _rounded(row.activation.cost),
            **({"dropped": dropped.get(row.name, "")} if dropped else {}),
        }
        for row in rows
    ]
    report.table(worded(table), "The measurements are explained in the README; all of them are in tables/ranking.csv.")


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(float(value), 3)


def _short(name: str) -> str:
    for long, short in (("level", ""), ("-repeat", "."), ("vit-block", "vit"), ("-res-", " res-"), ("-vit", " vit")):
        name = name.replace(long, short)
    return name
