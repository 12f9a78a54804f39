"""NeMo on the zoo's two models that memorise: what it finds and closes, at what cost, against the truth and a trial.

    python benchmarks/nemo_zoo.py [--model NAME] [--part NAME] [--verified 2] [--restart] [--smoke]

All 24 items on both models, about twenty minutes of one core. Every finished part is kept in runs/nemo-zoo and
written to benchmarks/results/nemo-zoo.json and .md at once; an interrupted study continues, and other weights start
another one. `--smoke` takes half a minute and writes no results.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

import torch
from nemo_zoo_parts import PARTS, Rows
from nemo_zoo_study import SMOKE, Size, Study
from nemo_zoo_trial import TRIAL

from diffcore import zoo
from diffcore.io.jsonfile import read_trusted, write_json, write_text
from diffcore.models import load
from diffcore.run import Run
from diffcore.runtime import Runtime

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "nemo-zoo.json"
MODELS = ("portraits-sd-memorised", "portraits-sd-planted")
NOTES = {
    "localization": "Each item with its own neurons off, and with as many random others off.",
    "detection": "First-step consistency. Verbatim and template captions were planted; no training held the decoys. "
    "Ordinary captions that say more are more consistent: full ones are the harder class.",
    "near misses": "Share of samples that copy the item's image, before and with the item's own neurons off.",
    "minimal set": "One set for all items. Damage is what ordinary captions feel at the first step; the minimal set is "
    "allowed .1. Confirmed: widened where images of other seeds were still copies.",
    "mitigations": "One for all captions; neurons are the confirmed minimal set.",
    "statuses": "The last word is the images': items none of whose seeds copies with their own neurons off.",
    "verification": "On a few items, with the confirmed set off, and decoys as controls.",
}


def study(name: str, parts: Sequence[str], size: Size, out: Path, *, restart: bool = False) -> dict[str, Any]:
    """Returns the parts of one model, and writes each to the results as soon as it is there."""
    model = load(f"zoo:{name}", Runtime(device="cpu", threads=1))
    folder = out / f"{name}-{model.fingerprint[:8]}"
    found: dict[str, Any] = {}
    config = {"model": name, **{key: value for key, value in asdict(size).items() if key != "verified"}}
    inputs = {model.name: model.fingerprint}
    with Run.open(folder, command="nemo_zoo.py", config=config, inputs=inputs, restart=restart) as run:
        this = Study(model, zoo.memorised(), size, run)
        for part in parts:
            key = f"part-{part}-{size.verified}" if part == "verification" else f"part-{part}"
            if run.missing([key]):
                start = time.process_time()
                rows = with_trial(name, part, PARTS[part](this))
                run.save(key, {}, rows=rows, minutes=(time.process_time() - start) / 60)
            fields = run.load(key).fields
            found[part] = {"rows": fields["rows"], "minutes": fields["minutes"], "timestep": this.step.t}
            print(f"{name}, {part}: {fields['minutes']:.1f} minutes of CPU", flush=True)
            print(table(fields["rows"]), flush=True)
            if size.items == Size.items:
                record(name, part, model.fingerprint, found[part])
    return found


def with_trial(model: str, part: str, rows: Rows) -> Rows:
    """Returns the rows with the trial's figures beside ours."""
    known = TRIAL[model].get(part, {})
    merged = []
    for row in rows:
        label = next(iter(row.values()))
        merged.append(row | {f"trial: {name}": value for name, value in known.get(label, {}).items()})
    return merged


def record(model: str, part: str, fingerprint: str, found: Mapping[str, Any]) -> None:
    """Adds a part to the results, and drops what is of other weights."""
    results = read_trusted(RESULTS) if RESULTS.exists() else {}
    mine = results.get(model, {})
    mine = mine if mine.get("fingerprint") == fingerprint else {"fingerprint": fingerprint}
    results = {name: results.get(name, {}) for name in MODELS} | {model: mine | {part: found}}
    write_json(RESULTS, results)
    write_text(RESULTS.with_suffix(".md"), page(results))


def page(results: Mapping[str, Any]) -> str:
    """Returns the results as Markdown."""
    lines = ["# NeMo on the zoo's memories", ""]
    for name, parts in results.items():
        lines += [f"## {name}", ""]
        for part, note in NOTES.items():
            if part in parts:
                at = f"Pure noise is shown at timestep {parts[part].get('timestep', 981):g}."  # once always the first
                minutes = f"{at} {parts[part]['minutes']:.1f} minutes of one core."
                lines += [f"### {part.capitalize()}", "", f"{note} {minutes}", "", table(parts[part]["rows"]), ""]
    return "\n".join(lines)


def table(rows: Rows) -> str:
    """Returns rows as Markdown; the trial's columns last."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    columns.sort(key=lambda column: column.startswith("trial: "))
    lines = [columns, ["---"] * len(columns), *([_shown(row.get(column)) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def main() -> None:
    """Studies the models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append", help="one or more; both by default")
    parser.add_argument("--part", choices=tuple(PARTS), action="append", help="one or more; all by default")
    parser.add_argument("--verified", type=int, default=Size.verified, help="number of items that are verified")
    parser.add_argument("--restart", action="store_true", help="measure anew: after a change of the code")
    parser.add_argument("--smoke", action="store_true", help="two items; no verification unless asked; no results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = [part for part in PARTS if part in (options.part or PARTS)]
    for name in options.model or (MODELS[-1:] if options.smoke else MODELS):
        if options.smoke:
            with tempfile.TemporaryDirectory() as folder:
                study(name, options.part or [part for part in parts if part != "verification"], SMOKE, Path(folder))
        else:
            size = replace(Size(), verified=options.verified)
            study(name, parts, size, ROOT / "runs" / "nemo-zoo", restart=options.restart)


if __name__ == "__main__":
    sys.exit(main())
