"""Tables of the immiscible-noise studies, and the files that hold several studies."""

from pathlib import Path
from statistics import mean, stdev

from diffcore.io.jsonfile import read_trusted, write_json, write_text
from immiscible_noise.study.compare import Comparison

RESULTS = Path(__file__).resolve().parent / "results"


def spread(values: list[float]) -> str:
    """Returns the mean of some values, with their deviation where there are several.

    Args:
        values: One value for each seed.
    """
    return f"{mean(values):.3g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")


def curves(study: Comparison) -> list[str]:
    """Returns the lines of a table in Markdown: Fréchet distance by coupling, kept step and sampling steps.

    Args:
        study: Study with all of its scores.
    """
    numbers = study.sampling_steps()
    lines = [
        f"| coupling | training steps | {' | '.join(f'{n} sampling steps' for n in numbers)} |",
        "|---|---|" + "---|" * len(numbers),
    ]
    for coupling in study.couplings():
        for step in sorted({score.step for score in study.scores}):
            cells = []
            for number in numbers:
                wanted = (coupling, step, number)
                cells.append(
                    spread([s.frechet for s in study.scores if (s.coupling, s.step, s.sampling_steps) == wanted])
                )
            lines.append(f"| {coupling} | {step:,} | {' | '.join(cells)} |")
    return lines


def record(stem: str, title: str, name: str, table: str, study: Comparison) -> None:
    """Writes a study into the results `STEM.json` and `STEM.md`, beside those that are there, and prints its table.

    Args:
        stem: Name of the result files, as that of the script with hyphens.
        title: Heading of the Markdown file.
        name: Name of the study among the others.
        table: Section of the study in Markdown.
        study: Study whose scores are kept.
    """
    file = RESULTS / f"{stem}.json"
    kept = read_trusted(file) if file.exists() else {}
    kept[name] = {
        "table": table,
        "summary": study.summary_rows(),
        "steps_to_equal_distance": study.speedup_rows(),
        "curves": [
            {"coupling": s.coupling, "seed": s.seed, "step": s.step, "steps": s.sampling_steps, "frechet": s.frechet}
            for s in study.scores
        ],
    }
    write_json(file, kept)
    head = f"# {title}\n\nWritten by `benchmarks/{stem.replace('-', '_')}.py`.\n"
    write_text(RESULTS / f"{stem}.md", "\n".join([head, *(part["table"] for part in kept.values())]))
    print(table, flush=True)
