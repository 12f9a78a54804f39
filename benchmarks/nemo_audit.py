"""Whether an audit that says "clean" has looked: its verdicts on captions of known truth, whatever its references.

    python benchmarks/nemo_audit.py [--model NAME] [--smoke]

The audited list holds the 24 memorised captions of the zoo, 32 decoys of their form that no training held, 200 ordinary
captions, and 8 template memories (one person before many backgrounds). It is audited on both models that memorised it
and on the one that did not, with default settings and the references that three strangers would choose. About ten
minutes of one core; writes benchmarks/results/nemo-audit.json and .md. `--smoke` takes half a minute, writes nothing.

The rule of the second look was fixed before its first run on these captions. It was chosen on the first six memorised
captions, the templates and twelve decoys of portraits-sd-planted, and on ordinary captions that are none of these. Of
portraits-sd-memorised only first steps had been seen, and images of three memorised captions and three decoys.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

import torch

from diffcore.io.jsonfile import read_trusted, write_json, write_text
from diffcore.models import load
from diffcore.run import Run, RunMap
from diffcore.runtime import Runtime
from diffcore.zoo.portraits.captions import ordinary_captions, same_form_captions
from diffcore.zoo.portraits.people import portraits
from diffcore.zoo.portraits.planted import planted
from nemo_localize import FirstStep, ImageSettings, StepSettings, calibrate, detect
from nemo_localize.evidence import Evidence, collect_evidence
from nemo_localize.likeness import likeness
from nemo_localize.second_look import described

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "nemo-audit.json"
MODELS = ("portraits-sd-memorised", "portraits-sd-planted", "portraits-sd")
QUANTILE = 0.99  # the default of the command
_SUBJECTS = (
    "castle", "garden", "lighthouse", "kitchen", "forest", "bicycle", "bird", "mountain", "queen", "sailor", "violin",
    "street", "teapot", "wolf",
)  # fmt: skip
_WAYS = (
    "a watercolour of a", "a sketch of a", "an oil painting of a", "close up of a", "a blurry", "a tiny", "a red",
    "an empty", "my favourite", "the last", "a poster of a", "a woodcut of a", "a sad", "a cartoon",
)  # fmt: skip


# Whole audits by the command, CPU seconds of one thread on a shared machine: of the commit before the second look, by
# the threshold alone, and now. Long lists of memories were not audited whole: verifying takes half a minute a caption.
WHOLE: tuple[dict[str, Any], ...] = (
    {
        "model": "portraits-sd-memorised",
        "audited": "3 memorised captions, 3 decoys",
        "references": "200 ordinary captions of the model's own data",
        "found before": "1 memorised",
        "s before": 151,
        "found now": "3 memorised",
        "s now": 240,
    },
    {
        "model": "portraits-sd-memorised",
        "audited": "3 memorised captions, 3 decoys",
        "references": "200 captions written like the audited ones",
        "found before": "3 memorised",
        "s before": 198,
        "found now": "3 memorised",
        "s now": 224,
    },
    {
        "model": "portraits-sd",
        "audited": "the list above",
        "references": "200 ordinary captions of the model's own data",
        "found before": "none",
        "s before": 22,
        "found now": "2 undecided",
        "s now": 37,
    },
)


def references(count: int) -> dict[str, list[str]]:
    """Returns the captions that three strangers would take for ordinary."""
    known = planted()
    generic = [f"{way} {subject}" for way in _WAYS for subject in _SUBJECTS][: count - 4]
    return {
        "ordinary captions of the model's own data": list(
            dict.fromkeys(ordinary_captions(portraits(501, range(count)), 501, known.captions))
        ),
        "captions written like the audited ones": same_form_captions(count, 502, known.captions),
        "generic prompts, four memorised by mistake": [*generic, *(item.caption for item in known.verbatim[10:14])],
    }


def audited(ordinary: int) -> dict[str, list[str]]:
    """Returns the audited captions by what they are to a model that memorised."""
    known = planted()
    drawn = ordinary_captions(portraits(510, range(2 * ordinary)), 510, known.captions)
    return {
        "memorised": [item.caption for item in known.verbatim],
        "template memories": [item.caption for item in known.template],
        "decoys": [item.caption for item in known.decoys],
        "ordinary": list(dict.fromkeys(drawn))[:ordinary],
    }


def measured(
    name: str, classes: Mapping[str, Sequence[str]], chosen: Mapping[str, Sequence[str]]
) -> list[dict[str, Any]]:
    """Returns the rows of one model."""
    model = load(f"zoo:{name}", Runtime(device="cpu", threads=1))
    captions = [text for texts in classes.values() for text in texts]
    rows = []
    for kind, ordinary in chosen.items():
        step = FirstStep(model, StepSettings())
        with (
            tempfile.TemporaryDirectory() as folder,
            Run.open(Path(folder) / "run", command="nemo_audit.py", config={}) as run,
        ):
            start = time.process_time()
            calibration = calibrate(step, ordinary, quantile=QUANTILE, map=RunMap(run))
            detect(step, captions, name="first-look", map=RunMap(run))
            first = time.process_time() - start
            found = collect_evidence(
                step, captions, ordinary, calibration, judge=likeness(), settings=ImageSettings(), map=RunMap(run)
            )
            both = time.process_time() - start
        rows.append(row(kind, classes, found) | {"first look, s": first, "both looks, s": both})
        print(name, rows[-1], flush=True)
    return rows


def row(kind: str, classes: Mapping[str, Sequence[str]], found: Evidence) -> dict[str, Any]:
    """Returns what an audit says of each class: before by the threshold alone, and now."""
    low, high = found.calibration.interval or (0.0, 0.0)
    told: dict[str, Any] = {
        "references": kind,
        "threshold": f"{found.calibration.tau:.3f} ({low:.3f} to {high:.3f})",
        "captions drawn": len(found.found.looks),
    }
    for name, texts in classes.items():
        above = sum(found.consistency[text] > found.calibration.tau for text in texts)
        verdicts = [found.verdicts[text] for text in texts]
        told[f"{name}, {len(texts)}: before"] = above
        told[f"{name}: memorised"] = verdicts.count("memorised")
        told[f"{name}: undecided"] = verdicts.count("undecided")
        told[f"{name}: clean"] = verdicts.count("clean")
    return told


def page(results: Mapping[str, Any]) -> str:
    """Returns the results as Markdown."""
    lines = [
        "# Whether an audit that says clean has looked",
        "",
        (__doc__ or "").split("\n\n")[2].replace("\n", " "),
        "",
    ]
    lines += [
        "Before: captions above the threshold, which is what an audit called memorised until it looked twice.",
        "",
    ]
    lines += [(__doc__ or "").strip().split("\n\n")[-1].replace("\n", " "), ""]
    for name in MODELS:
        if name in results:
            lines += [f"## {name}", "", *_tables(results[name]), ""]
    lines += ["## Whole audits", "", "CPU seconds of one thread, on a machine that others used too.", ""]
    lines += [f"| {' | '.join(WHOLE[0])} | ratio |", "| --- " * (len(WHOLE[0]) + 1) + "|"]
    lines += [f"| {' | '.join(map(str, row.values()))} | {row['s now'] / row['s before']:.2f} |" for row in WHOLE]
    return "\n".join([*lines, ""])


def _tables(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns one table with a row per choice of references and class."""
    lines = ["| references | threshold | captions | before: memorised | now: memorised | undecided | clean |"]
    lines += ["| --- " * 7 + "|"]
    for found in rows:
        names = [key.removesuffix(": before") for key in found if key.endswith(": before")]
        for place, name in enumerate(names):
            kind = name.rpartition(",")[0]
            cells = [found["references"] if not place else "", found["threshold"] if not place else "", name]
            cells += [found[f"{name}: before"], *(found[f"{kind}: {v}"] for v in ("memorised", "undecided", "clean"))]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "| references | captions drawn | first look, s of CPU | both looks | ratio |", "| --- " * 5 + "|"]
    for found in rows:
        first, both = found["first look, s"], found["both looks, s"]
        lines.append(
            f"| {found['references']} | {found['captions drawn']} | {first:.1f} | {both:.1f} | {both / first:.2f} |"
        )
    return lines


def main() -> None:
    """Audits the models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append", help="one or more; all by default")
    parser.add_argument("--smoke", action="store_true", help="a few captions; no results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.smoke:
        classes = {name: texts[:4] for name, texts in audited(4).items()}
        measured(MODELS[0], classes, {name: texts[-20:] for name, texts in references(20).items()})
        return
    for name in options.model or MODELS:
        found = measured(name, audited(200), references(200))
        results = read_trusted(RESULTS) if RESULTS.exists() else {}
        write_json(RESULTS, results | {"rule": described(), name: found, "whole": list(WHOLE)})
        write_text(RESULTS.with_suffix(".md"), page(read_trusted(RESULTS)))


if __name__ == "__main__":
    sys.exit(main())
