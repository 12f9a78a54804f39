"""Fine-tuning a small Stable Diffusion on people of one rare kind: ordinary noise, assigned noise, and half of each.

The zoo's portraits model is fine-tuned as a whole on drawn portraits of red-haired people with long hair and round
glasses, each with its caption, on latents that are encoded once. Paired seeds share order and noise. Fréchet distance
to the set in the features of the zoo's judge, over sampling steps. An interrupted run continues. Writes
`immiscible-finetune.json` and `.md` in benchmarks/results, and a run folder with a report.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

import torch
from cyclopts import App
from immiscible_tables import RESULTS, curves

from diffcore.data import ImageSet
from diffcore.io.jsonfile import write_json, write_text
from diffcore.metrics import feature_extractor
from diffcore.models import load
from diffcore.run import Run
from diffcore.runtime import Runtime
from diffcore.zoo.portraits.attributes import GLASSES, HAIRS, STYLES
from diffcore.zoo.portraits.captions import describe
from diffcore.zoo.portraits.people import portraits
from diffcore.zoo.portraits.pictures import draw_pictures
from immiscible_noise.app.report import write_page
from immiscible_noise.coupling import PRESETS
from immiscible_noise.study.compare import compare
from immiscible_noise.study.finetune import FineTuner
from immiscible_noise.study.settings import EvaluationSettings, FineTuneSettings
from immiscible_noise.study.tuning_set import TuningSet

MODEL, JUDGE = "zoo:portraits-sd", "zoo:portraits-oracle"
COUPLINGS = [PRESETS[name] for name in ("vanilla", "assignment", "half")]


def rare_people(count: int) -> tuple[ImageSet, list[str]]:
    """Returns portraits of red-haired people with long hair and round glasses, and their captions."""
    people = portraits(11, range(count))
    for name, values, chosen in (("hair", HAIRS, "red"), ("style", STYLES, "long"), ("glasses", GLASSES, "round")):
        people[name] = torch.full((count,), list(values).index(chosen))
    names = tuple(f"{number:04d}" for number in range(count))
    return ImageSet(draw_pictures(people).images, None, (), names), describe(people, full=True)


def run(
    steps: int = 80,
    seeds: int = 2,
    batch_size: int = 16,
    learning_rate: float = 1e-4,
    images: int = 256,
    samples: int = 256,
    out: Path = Path("runs/immiscible-finetune"),
) -> int:
    """Fine-tunes and measures everything.

    Args:
        steps: Training steps.
        seeds: Trainings per coupling.
        batch_size: Images per step.
        learning_rate: Step size of AdamW.
        images: Number of portraits.
        samples: Samples per measurement.
        out: Run folder.
    """
    torch.set_num_threads(1)
    runtime = Runtime(device="cpu")
    model, judge = load(MODEL, runtime), feature_extractor(JUDGE, runtime)
    data, captions = rare_people(images)
    settings = FineTuneSettings(
        steps=steps, batch_size=batch_size, learning_rate=learning_rate, snapshots=1, ema_decay=0.98
    )
    evaluation = EvaluationSettings(sampling_steps=(5, 10), num_samples=samples, sampling_batch=128)
    given = {"steps": steps, "seeds": seeds, "batch_size": batch_size, "learning_rate": learning_rate}
    inputs = {"portraits": data.sha256, MODEL: model.fingerprint, JUDGE: judge.sha256}
    config = given | {"images": images, "samples": samples}
    with Run.open(out, command="immiscible-noise compare", config=config, inputs=inputs) as part:
        tuner = FineTuner(TuningSet.encode(model, data, captions, part), MODEL)
        study = compare(
            data,
            inputs,
            part,
            COUPLINGS,
            range(seeds),
            settings,
            evaluation,
            runtime,
            extractor=judge,
            trainer=tuner,
        )
        part.finish(study.summary())
        write_page(part)
    lines = [
        "# Fine-tuning portraits on one rare kind",
        "",
        f"Written by `benchmarks/immiscible_finetune.py`: {MODEL} fine-tuned for {steps} steps of {batch_size} on "
        f"{images} portraits with {len(set(captions))} different captions. Fréchet distance to the set, {samples} "
        f"samples with its captions by DDIM, mean ± deviation over {seeds} paired seeds; real against real "
        f"{study.floor:.1f} at {study.floor_size} images. Features: {study.features}.",
        "",
        *curves(study),
    ]
    write_json(RESULTS / "immiscible-finetune.json", {"settings": config, "summary": study.summary_rows()})
    write_text(RESULTS / "immiscible-finetune.md", "\n".join([*lines, ""]))
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(App(help=__doc__, result_action="return_value", default_command=run)())
