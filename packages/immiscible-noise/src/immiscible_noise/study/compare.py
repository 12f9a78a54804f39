"""Trains with several couplings on the same seeds and measures the models: the paired study behind every claim."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

from diffcore.data import ImageSet
from diffcore.errors import CorruptArtifactError, UserError, printable
from diffcore.io import artifact
from diffcore.metrics import FeatureExtractor
from diffcore.run import Run
from diffcore.runtime import Runtime
from immiscible_noise.coupling import Coupling
from immiscible_noise.study.classifier import TrainedClassifier, shared_classifier
from immiscible_noise.study.crossing import Speedup, crossing, speedup
from immiscible_noise.study.evaluate import Evaluator, Score
from immiscible_noise.study.recipe import AnyRecipe, Recipe
from immiscible_noise.study.settings import EvaluationSettings, FitSettings
from immiscible_noise.study.train import load_snapshot, train
from immiscible_noise.study.tuned_recipe import recipe_of

_LOG = logging.getLogger("diffcore.immiscible_noise")
_GRID = 40

Trainer = Callable[[ImageSet, Run, Coupling, Any, Runtime], AnyRecipe]
"""Trains with one coupling, as `study.train.train` or a `study.finetune.FineTuner` does."""


@dataclass(frozen=True)
class Comparison:
    """The scores of a study, with what must be said beside them.

    Attributes:
        scores: One per coupling, seed, kept weights and number of sampling steps.
        features: Description of the features that distances are measured in.
        floor: Real-versus-real distance, at `floor_size` images a side.
        floor_size: Number of images on each side of `floor`.
        recipes: One per coupling and seed.
    """

    scores: list[Score]
    features: str
    floor: float
    floor_size: int
    recipes: list[AnyRecipe]

    def final(self, coupling: str, sampling_steps: int) -> list[Score]:
        """Returns a coupling's scores after the last training step, in the order of the seeds."""
        matching = [s for s in self.scores if s.coupling == coupling and s.sampling_steps == sampling_steps]
        last = max(s.step for s in matching)
        return sorted((s for s in matching if s.step == last), key=lambda s: s.seed)

    def couplings(self) -> list[str]:
        """Returns the names of the couplings in the order of the study."""
        return list(dict.fromkeys(s.coupling for s in self.scores))

    def sampling_steps(self) -> list[int]:
        """Returns the numbers of solver steps, ascending."""
        return sorted({s.sampling_steps for s in self.scores})

    def ratio(self, coupling: str, sampling_steps: int) -> tuple[float, float | None]:
        """Returns the mean over seeds of a coupling's distance over vanilla's at the same seed, and its deviation."""
        pairs = zip(self.final(coupling, sampling_steps), self.final("vanilla", sampling_steps), strict=True)
        ratios = [ours.frechet / theirs.frechet for ours, theirs in pairs]
        return mean(ratios), stdev(ratios) if len(ratios) > 1 else None

    def steps_to_equal(self, coupling: str, sampling_steps: int, *, for_good: bool) -> Speedup:
        """Returns how many times fewer training steps a coupling takes than vanilla to vanilla's last distance.

        Args:
            coupling: Name of the coupling that is compared with vanilla at equal seeds.
            sampling_steps: Number of solver steps.
            for_good: Count the steps from which on the distance stays reached, not those to where it is first reached.
        """
        pairs = []
        for last in self.final("vanilla", sampling_steps):
            taken = []
            for name in ("vanilla", coupling):
                curve = sorted(
                    (s.step, s.frechet)
                    for s in self.scores
                    if (s.coupling, s.seed, s.sampling_steps) == (name, last.seed, sampling_steps)
                )
                found = crossing(*zip(*curve, strict=True), goal=last.frechet)
                taken.append(found.for_good if for_good else found.first)
            pairs.append((taken[0], taken[1]))
        return speedup(pairs)

    def speedup_rows(self) -> list[dict[str, Any]]:
        """Returns one row per coupling and number of sampling steps: steps to vanilla's last distance, in words."""
        if "vanilla" not in self.couplings():
            return []
        rows = []
        for coupling, steps in product(self.couplings(), self.sampling_steps()):
            if coupling != "vanilla":
                row: dict[str, Any] = {"coupling": coupling, "sampling_steps": steps}
                for name, for_good in (("fewer_steps_at_first", False), ("fewer_steps_for_good", True)):
                    row[name] = _times(self.steps_to_equal(coupling, steps, for_good=for_good))
                rows.append(row)
        return rows

    def speedup_table(self) -> list[dict[str, Any]]:
        """Returns `speedup_rows` in numbers: mean, least and most over seeds; None where some seed never arrives."""
        if "vanilla" not in self.couplings():
            return []
        rows = []
        for coupling, steps in product(self.couplings(), self.sampling_steps()):
            if coupling == "vanilla":
                continue
            row: dict[str, Any] = {"coupling": coupling, "sampling_steps": steps}
            for name, for_good in (("at_first", False), ("for_good", True)):
                found = self.steps_to_equal(coupling, steps, for_good=for_good)
                row |= {f"fewer_steps_{name}": found.mean, f"{name}_least": found.least, f"{name}_most": found.most}
                row |= {f"{name}_reached": found.reached, "seeds": found.pairs}
            rows.append(row)
        return rows

    def summary_rows(self) -> list[dict[str, Any]]:
        """Returns one row per coupling and number of sampling steps: mean, deviation and ratio over the seeds."""
        rows = []
        for coupling, steps in product(self.couplings(), self.sampling_steps()):
            final = self.final(coupling, steps)
            distances = [s.frechet for s in final]
            row: dict[str, Any] = {"coupling": coupling, "sampling_steps": steps, "seeds": len(final)}
            row["frechet"] = mean(distances)
            row["frechet_std"] = stdev(distances) if len(distances) > 1 else None
            if "vanilla" in self.couplings():
                row["ratio"], row["ratio_std"] = self.ratio(coupling, steps)
            if accuracies := [s.accuracy for s in final if s.accuracy is not None]:
                row["accuracy"] = mean(accuracies)
            rows.append(row)
        return rows

    def summary(self) -> dict[str, Any]:
        """Returns the figures of `result.json`: by coupling and sampling steps, after the last training step."""
        rows = {f"{row['coupling']}, {row['sampling_steps']} steps": row for row in self.summary_rows()}
        return {
            "frechet": {name: row["frechet"] for name, row in rows.items()},
            "ratio": {
                name.replace(",", " / vanilla,"): row["ratio"]
                for name, row in rows.items()
                if "ratio" in row and row["coupling"] != "vanilla"
            },
            "accuracy": {name: row["accuracy"] for name, row in rows.items() if "accuracy" in row},
            "times_fewer_training_steps_to_equal_distance": {
                f"{row['coupling']}, {row['sampling_steps']} steps": f"at first {row['fewer_steps_at_first']}, "
                f"for good {row['fewer_steps_for_good']}"
                for row in self.speedup_rows()
            },
            "seeds": max(row["seeds"] for row in rows.values()),
            "real_versus_real": self.floor,
            "features": self.features,
        }

    def save(self, run: Run) -> None:
        """Writes the study as part `comparison` of a run, and its tables."""
        fields = {"scores": [asdict(score) for score in self.scores], "features": self.features, "floor": self.floor}
        recipes = [recipe.fields() for recipe in self.recipes]
        run.save("comparison", {}, **fields, floor_size=self.floor_size, recipes=recipes)
        run.table("scores", [asdict(score) for score in self.scores])
        run.table("summary", self.summary_rows())
        run.table("steps_to_equal_distance", self.speedup_table())

    @classmethod
    def load(cls, folder: Path) -> "Comparison":
        """Reads what `save` wrote into a run folder.

        Raises:
            CorruptArtifactError: The part is damaged, or was written by an earlier version.
        """
        fields = artifact.load(folder / "parts" / "comparison").fields
        if "arm" in fields["scores"][0]:
            raise CorruptArtifactError(
                f"{printable(folder, 300)} was written by an earlier version of immiscible-noise; "
                "give its command again with another folder"
            )
        return cls(
            scores=[Score(**row) for row in fields["scores"]],
            features=fields["features"],
            floor=fields["floor"],
            floor_size=fields["floor_size"],
            recipes=[recipe_of(recipe) for recipe in fields["recipes"]],
        )


def compare(
    images: ImageSet,
    inputs: Mapping[str, str],
    run: Run,
    couplings: Iterable[Coupling],
    seeds: Iterable[int],
    settings: FitSettings,
    evaluation: EvaluationSettings,
    runtime: Runtime,
    *,
    classifier: TrainedClassifier | None = None,
    extractor: FeatureExtractor | None = None,
    trainer: Trainer = train,
) -> Comparison:
    """Trains with every coupling on every seed and measures all kept weights; finished parts are read, not repeated.

    The trainings of one seed share initial weights, data order and noise stream.

    Args:
        images: Training images, which are also the reference of the distances.
        inputs: Name and sha256 of the data.
        run: Folder of the study; each training gets a run of its own below `couplings/`.
        couplings: Couplings that are compared; "vanilla" is the baseline of the ratios.
        seeds: One number per training with each coupling.
        settings: Settings that all trainings share.
        evaluation: Settings that all measurements share.
        runtime: Device, precision and processes; its seed is not used.
        classifier: Feature extractor; by default one is trained on the images' labels, once.
        extractor: Network that gives the features in place of the classifier's.
        trainer: Trains with one coupling; by default a new network in pixel space.
    """
    classifier = classifier or shared_classifier(images, run, runtime)
    has_codec = trainer is not train
    device = runtime.torch_device
    evaluator = Evaluator(images, classifier, evaluation, device, extractor=extractor, has_codec=has_codec)
    couplings, scores, recipes = list(couplings), list[Score](), list[AnyRecipe]()
    for seed, coupling in product(seeds, couplings):
        with Run.open(
            _training_folder(run, coupling.name, seed),
            command="immiscible-noise train",
            config={**asdict(coupling), **asdict(settings), "seed": seed},
            inputs=inputs,
            volatile=["checkpoint_every"],
        ) as training:
            recipe = trainer(images, training, coupling, settings, replace(runtime, seed=seed))
            scores += measure(evaluator, recipe, training.folder, run)
            training.finish({"coupling": coupling.name, "seed": seed})
        recipes.append(recipe)
    study = _study(evaluator, scores, recipes)
    _save_grids(study, run, evaluator)
    study.save(run)
    return study


def evaluate_training(
    training: Path,
    recipe: AnyRecipe,
    images: ImageSet,
    run: Run,
    evaluation: EvaluationSettings,
    runtime: Runtime,
    *,
    extractor: FeatureExtractor | None = None,
) -> Comparison:
    """Measures one trained model and saves the result in `run`.

    Args:
        training: Run folder of a finished training.
        recipe: Recipe that the folder holds; that of a fine-tuned model with the conditions of the images.
        images: Real images, of the size and the classes that the model was trained on.
        run: Run folder that receives scores and tables.
        evaluation: Settings of the measurement.
        runtime: Device and precision of the sampling.
        extractor: Network that gives the features in place of a classifier's.

    Raises:
        UserError: The images do not fit the model.
    """
    check_evaluation(recipe, images, evaluation)
    _warn_of_samplers(recipe, evaluation)
    classifier = shared_classifier(images, run, runtime)
    device, has_codec = runtime.torch_device, recipe.has_codec
    evaluator = Evaluator(images, classifier, evaluation, device, extractor=extractor, has_codec=has_codec)
    study = _study(evaluator, measure(evaluator, recipe, training, run), [recipe])
    study.save(run)
    return study


def check_evaluation(recipe: AnyRecipe, images: ImageSet, evaluation: EvaluationSettings) -> None:
    """Refuses images and settings that a trained model cannot be measured with.

    Args:
        recipe: How the model was trained.
        images: Real images to compare with.
        evaluation: Settings of the measurement.

    Raises:
        UserError: The images do not fit the model, or it knows no guidance.
    """
    if images.images.shape[1:] != recipe.shape:
        size, wanted = (f"{c}x{h}x{w}" for c, h, w in (images.images.shape[1:], recipe.shape))
        changes = [] if images.images.shape[-1] == recipe.shape[1] else [f"give `size` {recipe.shape[1]}"]
        if images.images.shape[1] != recipe.shape[0]:
            changes.append("give `grey=True`" if recipe.shape[0] == 1 else "leave out `grey`")
        raise UserError(f"the model makes {wanted} images, the data are {size}; {' and '.join(changes)}")
    classes = recipe.num_classes if isinstance(recipe, Recipe) else None
    if classes is not None and (images.labels is None or len(images.classes) != classes):
        raise UserError(
            f"the model is conditioned on {classes} classes, the data have {len(images.classes)}; "
            "give images with one sub-folder for each class that it was trained on"
        )
    if evaluation.guidance != 1 and isinstance(recipe, Recipe):
        raise UserError(f"`guidance` is {evaluation.guidance:g}, but this model knows no empty condition; leave it out")


def _warn_of_samplers(recipe: AnyRecipe, evaluation: EvaluationSettings) -> None:
    """Warns of samplers that add fresh noise to what a model makes that was trained on assigned noise."""
    if recipe.coupling.method != "vanilla" and evaluation.eta > 0:
        _LOG.warning(
            "this model was trained on %s noise: its output is no score, and stochastic sampling (eta %g) is biased",
            recipe.coupling.name,
            evaluation.eta,
        )
    if (
        recipe.coupling.method != "vanilla"
        and recipe.settings.consistency
        and max(evaluation.steps_for(recipe.settings)) > 1
    ):
        _LOG.warning(
            "this consistency function was trained on %s noise: every step after the first adds fresh noise, which "
            "makes it a stochastic sampler, and its samples may be ruined; look at one step first",
            recipe.coupling.name,
        )


def measure(evaluator: Evaluator, recipe: AnyRecipe, training: Path, store: Run) -> list[Score]:
    """Returns the scores of all kept weights of a training; those that `store` holds are read, not computed."""
    scores: list[Score] = []
    for step in recipe.settings.snapshot_steps:
        key = f"score-of-{recipe.coupling.name}-seed{recipe.seed}-{step}"
        if store.missing([key]):
            measured = evaluator.scores(load_snapshot(recipe, training, step, evaluator.device), recipe, step)
            store.save(key, {}, scores=[asdict(score) for score in measured])
        scores += [Score(**row) for row in store.load(key).fields["scores"]]
    return scores


def _times(found: Speedup) -> str:
    """Returns a speed-up in words: mean over the seeds, with the least and the most."""
    if found.mean is None:
        return f"not reached by {found.pairs - found.reached} of {found.pairs}"
    spread = "" if found.pairs == 1 else f" ({found.least:.2g} to {found.most:.2g})"
    return f"{found.mean:.2g}{spread}"


def _study(evaluator: Evaluator, scores: list[Score], recipes: list[AnyRecipe]) -> Comparison:
    floor = evaluator.floor()
    return Comparison(scores, evaluator.description, floor.value, floor.n, recipes)


def _training_folder(run: Run, coupling: str, seed: int) -> Path:
    return run.folder / "couplings" / f"{coupling}-seed{seed}"


def _save_grids(study: Comparison, run: Run, evaluator: Evaluator) -> None:
    """Keeps samples of every coupling from equal noise, of the first seed and the last weights, at the fewest steps."""
    steps = study.sampling_steps()[0]
    grids = {}
    for recipe in study.recipes:
        if (name := recipe.coupling.name) in grids:
            continue
        last = recipe.settings.snapshot_steps[-1]
        denoiser = load_snapshot(recipe, _training_folder(run, name, recipe.seed), last, evaluator.device)
        count = 12 if recipe.has_codec else _GRID

        def drawn(rows: Tensor, recipe: AnyRecipe = recipe, denoiser: Any = denoiser, count: int = count) -> Tensor:
            conditions = recipe.some_conditions(count)
            asked = None if conditions is None else conditions[rows]
            return recipe.generate(denoiser, rows, asked, steps=steps, guidance=evaluator.evaluation.guidance)

        grids[name] = torch.cat([*evaluator.in_batches(torch.arange(count), drawn)])
    run.save("grids", grids, sampling_steps=steps)
