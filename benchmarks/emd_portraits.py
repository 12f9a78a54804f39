"""The zoo's portraits in one step: text-to-image with guidance, the exported folder, and whether a student copies too.

    python benchmarks/emd_portraits.py [--minutes 12] [--part ordinary|memories|others] [--smoke]

Three trainings of `--minutes` of CPU each: of portraits-sd on ordinary captions; of portraits-sd-memorised with its
memorised captions among the prompts; of the same model without them. Each finished one is kept and written to
benchmarks/results/emd-portraits*.json, .md and .png at once. `--smoke` trains for two iterations and writes no results.
"""

import copy
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

import torch
from cyclopts import App, Parameter
from torch import Tensor, nn

from diffcore import zoo
from diffcore.denoiser import GuidedDenoiser
from diffcore.io.files import write_whole
from diffcore.io.jsonfile import read_trusted, write_json, write_text
from diffcore.io.shipped import shipped_folder
from diffcore.metrics.attribute_network import load_attribute_network
from diffcore.models import DiffusionModel, load
from diffcore.models.generation import null_condition
from diffcore.noise import row_noise
from diffcore.report import image_grid
from diffcore.run import Run
from diffcore.runtime import Runtime
from diffcore.zoo.oracle import accuracies
from diffcore.zoo.portraits.captions import describe, ordinary_captions
from diffcore.zoo.portraits.gates import PortraitsJudge, nearest_similarity, share_above, similarity_to
from diffcore.zoo.portraits.judge import labels_of
from diffcore.zoo.portraits.people import portraits, select
from emd_distill.conditions import InTurn, condition_table
from emd_distill.distill import Settings, distill
from emd_distill.files.export import export
from emd_distill.generator import OneStepGenerator, level_of
from emd_distill.losses import EMD
from emd_distill.noise_levels import noise_levels
from emd_distill.quality import drawn_images, measured, teacher_images

RESULTS = Path(__file__).resolve().parent / "results"
ATTRIBUTES = ("background", "skin", "style", "hair", "beard", "hat", "gender", "glasses")
GUIDANCE, BATCH, CAPTIONS, EVALUATED, COPIES = 2.0, 32, 3000, 200, 4
_LEVEL = -1.8326  # log signal-to-noise ratio at which sigma / alpha is 2.5
Part = Literal["ordinary", "memories", "others"]
MODEL: dict[Part, str] = {
    "ordinary": "portraits-sd",
    "memories": "portraits-sd-memorised",
    "others": "portraits-sd-memorised",
}
ABOUT: dict[Part, str] = {
    "ordinary": "portraits-sd on ordinary captions",
    "memories": "portraits-sd-memorised, a quarter of the prompts its memorised captions",
    "others": "portraits-sd-memorised, on ordinary captions alone",
}


@dataclass(frozen=True, eq=False)
class Study:
    """A teacher with the captions that its student learns, and the judge of both.

    Attributes:
        part: Name of the training.
        count: Number of evaluated captions.
    """

    part: Part
    count: int

    @cached_property
    def model(self) -> DiffusionModel:
        """The teacher."""
        return load(f"zoo:{MODEL[self.part]}", Runtime(device="cpu", threads=1))

    @cached_property
    def judge(self) -> PortraitsJudge:
        """The zoo's oracle, with real images of strangers."""
        return PortraitsJudge(load_attribute_network(shipped_folder("portraits-oracle")))

    @cached_property
    def truth(self) -> zoo.Memorised:
        """What the memorising model was planted with."""
        return zoo.memorised()

    @property
    def prompts(self) -> list[str]:
        """Captions of the training: full ones and ordinary ones of strangers, and memorised ones where wanted."""
        people = portraits(41, range(CAPTIONS))
        verbatim = [item.caption for item in self.truth.verbatim]
        told = describe(people, full=True)[: CAPTIONS // 2]
        told += ordinary_captions(people, 41, verbatim)[CAPTIONS // 2 :]
        return told + verbatim * (len(told) // (3 * len(verbatim))) if self.part == "memories" else told

    def teacher(self, captions: Sequence[str], steps: int, seed: int) -> Tensor:
        """Returns the teacher's images of captions in some steps, with guidance."""
        return teacher_images(
            self.model, condition_table(self.model, captions), len(captions), seed=seed, steps=steps,
            guidance_scale=GUIDANCE, uncond=null_condition(self.model), batch_size=128,
        )  # fmt: skip

    def student(self, generator: nn.Module, captions: Sequence[str], seed: int) -> Tensor:
        """Returns the images of captions in one step."""
        table = condition_table(self.model, captions)
        return drawn_images(self.model, generator, table, len(captions), seed=seed, batch_size=128)

    def quality(self, images: Tensor) -> dict[str, float]:
        """Returns caption accuracy by attribute, and the distance to real images, of images of the evaluated people."""
        people = select(self.judge.real.people, slice(len(images)))
        read = accuracies(self.judge.oracle, images, labels_of(people))
        read = {name: read[name] for name in ATTRIBUTES}
        scores = measured(self.judge.real_features, self.judge.oracle.features(images))
        return {"caption accuracy": sum(read.values()) / len(read), **scores.to_json(), **read}

    def evaluated(self) -> list[str]:
        """Returns full captions of strangers that no training contains."""
        return describe(select(self.judge.real.people, slice(self.count)), full=True)

    def copying(self, draw: Any) -> dict[str, float]:
        """Returns how far images are copies: of memorised captions, and of decoys that were never trained."""
        verbatim = [item.caption for item in self.truth.verbatim for _ in range(COPIES)]
        decoys = [item.caption for item in self.truth.decoys for _ in range(COPIES // 2)]
        similar = similarity_to(self.truth.verbatim_images, draw(verbatim, 5))
        nearest = nearest_similarity(self.truth.verbatim_images, draw(decoys, 6))
        return {
            "share of copies": share_above(similar),
            "captions that are copied": int((similar > 0.7).any(1).sum()),
            "mean SSIM": float(similar.mean()),
            "share of copies, decoys": share_above(nearest),
        }


def settings(steps: int) -> Settings:
    """Returns the settings: no chain in the first half, four steps in eps in the second."""
    return Settings(
        loss=EMD(num_steps={0: 0, max(steps // 2, 1): 4}, gamma_z=0.0), steps=steps, batch_size=BATCH,
        learning_rate=3e-4, student_learning_rate=1e-3, ema=0.99,
    )  # fmt: skip


def train(study: Study, steps: int, on_step: Any = None) -> OneStepGenerator:
    """Returns a trained generator."""
    plain = study.model.denoiser
    settled = settings(steps)
    done = distill(
        GuidedDenoiser(plain, GUIDANCE, null_condition(study.model)),
        OneStepGenerator(copy.deepcopy(plain).requires_grad_(True), level_of(plain.schedule, _LEVEL)),
        study.model.shape,
        settled,
        student=copy.deepcopy(plain).requires_grad_(True),
        time_sampler=noise_levels(plain.schedule, "uniform"),
        conditions=InTurn(condition_table(study.model, study.prompts), BATCH, 0),
        on_step=on_step,
    )
    assert isinstance(done.generator, OneStepGenerator)
    return done.generator


def iterations(run: Run, study: Study, minutes: float) -> int:
    """Returns how many iterations the minutes pay for; measured once, so that a resumed run is the same run."""
    if not run.has("cost"):
        begun = time.process_time()
        seen: list[float] = []
        train(study, 6, lambda *_: seen.append(time.process_time() - begun))
        run.save("cost", {}, seconds=(seen[4] - seen[0]) / 4)  # two without a chain, two with one
    return max(round(60 * minutes / run.load("cost").fields["seconds"]), 2)


def trained(run: Run, study: Study, steps: int) -> tuple[OneStepGenerator, dict[str, Any]]:
    """Returns the kept generator of a training, which is trained where there is none."""
    if not run.has("generator"):
        looks: list[dict[str, float]] = []
        begun, captions = time.process_time(), study.evaluated()[:100]

        def look(step: int, told: Any, average: nn.Module) -> None:
            if (step + 1) % max(steps // 8, 1) and step + 1 < steps:
                return
            quality = study.quality(study.student(average, captions, 1))
            seen = {"iteration": step + 1, "seconds": time.process_time() - begun}
            looks.append({**seen, "caption accuracy": quality["caption accuracy"], "distance": quality["distance"]})
            print(f"{study.part}: {looks[-1]}", flush=True)

        generator = train(study, steps, look)
        run.save("generator", generator.state_dict(), looks=looks, steps=steps)
    kept = run.load("generator")
    plain = copy.deepcopy(study.model.denoiser)
    generator = OneStepGenerator(plain, level_of(plain.schedule, _LEVEL))
    generator.load_state_dict(kept.tensors)
    return generator.eval(), {"iterations": kept.fields["steps"], "looks": kept.fields["looks"]}


def exported(study: Study, generator: OneStepGenerator, folder: Path) -> dict[str, Any]:
    """Writes the generator as a folder, and compares what plain diffusers draws from it with g(z)."""
    from diffusers import DiffusionPipeline

    shutil.rmtree(folder, ignore_errors=True)
    captions = study.evaluated()[:8]
    written = export(
        study.model, generator, folder, condition=condition_table(study.model, captions[:1]), licence="Apache-2.0"
    )
    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    z = row_noise(1, range(len(captions)), study.model.shape)
    drawn = pipeline(captions, num_inference_steps=1, guidance_scale=1.0, latents=z, output_type="np").images
    wanted = study.student(generator, captions, 1).clamp(0, 1)
    apart = (torch.from_numpy(drawn).permute(0, 3, 1, 2) - wanted).abs().max()
    return {
        "scheduler": written.scheduler,
        "t": written.t,
        "error of latents against g(z)": written.error,
        "largest difference of pixels, plain diffusers": float(apart),
    }


def study_part(part: Part, minutes: float, out: Path, *, smoke: bool) -> dict[str, Any]:
    """Trains and measures one part."""
    study = Study(part, 40 if smoke else EVALUATED)
    config = {"part": part, "minutes": minutes, "smoke": smoke}
    inputs = {study.model.name: study.model.fingerprint}
    with Run.open(out / part, command="emd_portraits.py", config=config, inputs=inputs) as run:
        steps = 2 if smoke else iterations(run, study, minutes)
        generator, told = trained(run, study, steps)
        captions = study.evaluated()
        plain = OneStepGenerator(study.model.denoiser, generator.t)
        ways: dict[str, Any] = {
            "student, 1 step": lambda texts, seed: study.student(generator, texts, seed),
            "teacher, 1 step": lambda texts, seed: study.student(plain, texts, seed),
            "teacher, 4 steps, guidance 2": lambda texts, seed: study.teacher(texts, 4, seed),
            "teacher, 50 steps, guidance 2": lambda texts, seed: study.teacher(texts, 50, seed),
        }
        rows = []
        for place, (name, draw) in enumerate(ways.items()):
            key = f"drawn-{place}"
            if not run.has(key):
                images = draw(captions, 1)
                copies = {} if part == "ordinary" else study.copying(draw)
                run.save(key, {"images": images[:64]}, quality=study.quality(images), copies=copies)
            fields = run.load(key).fields
            rows.append({"images of": name, **fields["quality"], **fields["copies"]})
            print(rows[-1], flush=True)
        if part == "ordinary":
            rows.append({"images of": "real pictures", **study.quality(study.judge.real.floats()[: study.count])})
        shown = torch.cat([run.load(f"drawn-{place}").tensors["images"][:10] for place in (3, 2, 1, 0)])
        labels = ["teacher, 50 steps", "teacher, 4 steps", "teacher, 1 step", "student, 1 step"]
        figure = image_grid(shown, columns=10, row_labels=labels)
        picture = run.figure("samples", figure)
        result = {"about": ABOUT[part], "teacher": study.model.name, **told, "rows": rows}
        result["cost"] = run.load("cost").fields["seconds"] if run.has("cost") else None
        if part == "ordinary":
            result["export"] = exported(study, generator, run.folder / "exported")
        if not smoke:
            write_whole(RESULTS / f"emd-portraits-{part}.png", picture.read_bytes())
        run.finish(result)
    return result


NOTE = (
    f"{EVALUATED} full captions of strangers that no training contains, one image each. Caption accuracy is the mean "
    "of eight attributes as the zoo's oracle reads them; distance, precision, recall and coverage are against 2000 "
    "real images, in the oracle's features. Copies: SSIM above .7 to the memorised image, 24 captions of 4 latents; "
    "decoys are captions of the same form that no training holds."
)


def markdown(results: dict[str, Any]) -> str:
    """Returns the results of all parts as Markdown."""
    lines = ["# Portraits in one step", "", NOTE, ""]
    for part in (name for name in ABOUT if name in results):
        result = results[part]
        lines += [f"## {result['about'][0].upper()}{result['about'][1:]}", ""]
        lines += [
            f"{result['iterations']} iterations of {BATCH} rows, {result['looks'][-1]['seconds']:.0f} s of CPU.",
            "",
        ]
        columns = list(dict.fromkeys(name for row in result["rows"] for name in row))
        lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        for row in result["rows"]:
            cells = [row.get(name, "") for name in columns]
            lines.append(f"| {' | '.join(f'{c:.3f}' if isinstance(c, float) else str(c) for c in cells)} |")
        lines += ["", "| iteration | caption accuracy (100) | distance (100) |", "|---|---|---|"]
        lines += [
            f"| {one['iteration']} | {one['caption accuracy']:.3f} | {one['distance']:.0f} |" for one in result["looks"]
        ]
        if "export" in result:
            lines += ["", "Exported folder: " + ", ".join(f"{k} {v}" for k, v in result["export"].items()) + "."]
        lines.append("")
    return "\n".join(lines)


def run(
    *,
    part: Part | None = None,
    minutes: float = 12.0,
    out: Path = Path("runs/emd-portraits"),
    smoke: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Trains and measures; returns 1 where the exported folder does not draw what the generator draws.

    Args:
        part: Training to run; by default all three.
        minutes: CPU minutes of each training.
        out: Folder of the run folders.
        smoke: Two iterations, no results.
    """
    torch.set_num_threads(1)
    path, failed = RESULTS / "emd-portraits.json", False
    chosen: list[Part] = [part] if part else list(MODEL)
    for name in chosen:
        result = study_part(name, minutes, out, smoke=smoke)
        failed |= result.get("export", {}).get("largest difference of pixels, plain diffusers", 0.0) > 1e-4
        results = {} if smoke or not path.exists() else read_trusted(path)
        results[name] = result
        print(markdown({name: result}), flush=True)
        if not smoke:
            write_json(path, results)
            write_text(path.with_suffix(".md"), markdown(results))
    return int(failed)


if __name__ == "__main__":
    app = App(help=__doc__)
    app.default(run)
    raise SystemExit(app())
