"""Trains several arms on the same seeds and measures them: the paired study behind every claim."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from diffcore.data import ImageSet
from diffcore.errors import UserError
from diffcore.io import artifact
from diffcore.run import Run
from diffcore.runtime import Runtime
from diffcore.train import PairNoise
from immiscible_noise.classifier import Classifier, TrainedClassifier, train_classifier
from immiscible_noise.evaluate import Evaluator, Score, as_rows, generate
from immiscible_noise.settings import Arm, EvaluationSettings, TrainSettings
from immiscible_noise.train import Recipe, load_snapshot, read_recipe, train

_LOG = logging.getLogger(__name__)
_GRID = 40
_LEAST_LEARNT = 0.05  # accuracy above the most frequent label, below which features mean nothing


@dataclass(frozen=True)
class Comparison:
    """The scores of a study, with what must be said beside them.

    Attributes:
        scores: One per arm, seed, kept weights and number of sampling steps.
        features: What the distances are measured in.
        floor: Real-versus-real distance, at `floor_size` images a side.
        floor_size: See `floor`.
        recipes: One per arm and seed.
    """

    scores: list[Score]
    features: str
    floor: float
    floor_size: int
    recipes: list[Recipe]

    def final(self, arm: str, sampling_steps: int) -> list[Score]:
        """Returns an arm's scores after the last training step, in the order of the seeds."""
        matching = [s for s in self.scores if s.arm == arm and s.sampling_steps == sampling_steps]
        last = max(s.step for s in matching)
        return sorted((s for s in matching if s.step == last), key=lambda s: s.seed)

    def arms(self) -> list[str]:
        """Returns the arms in the order of the study."""
        return list(dict.fromkeys(s.arm for s in self.scores))

    def sampling_steps(self) -> list[int]:
        """Returns the numbers of solver steps, ascending."""
        return sorted({s.sampling_steps for s in self.scores})

    def ratio(self, arm: str, sampling_steps: int, baseline: str = "vanilla") -> tuple[float, float | None]:
        """Returns the mean over seeds of an arm's distance over the baseline's at the same seed, and its deviation."""
        pairs = zip(self.final(arm, sampling_steps), self.final(baseline, sampling_steps), strict=True)
        ratios = [ours.frechet / theirs.frechet for ours, theirs in pairs]
        return mean(ratios), stdev(ratios) if len(ratios) > 1 else None

    def summary_rows(self) -> list[dict[str, Any]]:
        """Returns one row per arm and number of sampling steps: mean, deviation and ratio over the seeds."""
        rows = []
        for arm in self.arms():
            for steps in self.sampling_steps():
                final = self.final(arm, steps)
                distances = [s.frechet for s in final]
                accuracies = [s.accuracy for s in final if s.accuracy is not None]
                row: dict[str, Any] = {
                    "arm": arm,
                    "sampling_steps": steps,
                    "seeds": len(final),
                    "frechet": mean(distances),
                }
                row["frechet_std"] = stdev(distances) if len(distances) > 1 else None
                if "vanilla" in self.arms():
                    row["ratio"], row["ratio_std"] = self.ratio(arm, steps)
                if accuracies:
                    row["accuracy"] = mean(accuracies)
                rows.append(row)
        return rows

    def summary(self) -> dict[str, Any]:
        """Returns the figures of `result.json`: by arm and number of sampling steps, after the last training step."""
        rows = self.summary_rows()
        return {
            "frechet": {f"{row['arm']}, {row['sampling_steps']} steps": row["frechet"] for row in rows},
            "ratio": {
                f"{row['arm']} / vanilla, {row['sampling_steps']} steps": row["ratio"]
                for row in rows
                if row.get("ratio") is not None and row["arm"] != "vanilla"
            },
            "accuracy": {
                f"{row['arm']}, {row['sampling_steps']} steps": row["accuracy"] for row in rows if "accuracy" in row
            },
            "seeds": max(row["seeds"] for row in rows),
            "real_versus_real": self.floor,
            "features": self.features,
        }

    def save(self, run: Run) -> None:
        """Writes the study as part `comparison` of a run, and its tables."""
        run.save("comparison", {}, **asdict(self))
        run.table("scores", as_rows(self.scores))
        run.table("summary", self.summary_rows())

    @classmethod
    def load(cls, folder: Path) -> "Comparison":
        """Reads what `save` wrote into a run folder."""
        fields = artifact.load(folder / "parts" / "comparison").fields
        return cls(
            scores=[Score(**row) for row in fields["scores"]],
            features=fields["features"],
            floor=fields["floor"],
            floor_size=fields["floor_size"],
            recipes=[Recipe.from_fields(recipe) for recipe in fields["recipes"]],
        )


def compare(
    images: ImageSet,
    inputs: dict[str, str],
    run: Run,
    arms: Iterable[Arm],
    seeds: Iterable[int],
    settings: TrainSettings,
    evaluation: EvaluationSettings,
    runtime: Runtime,
    *,
    classifier: TrainedClassifier | None = None,
    couplings: dict[str, Callable[[int], PairNoise | None]] | None = None,
) -> Comparison:
    """Trains every arm on every seed and measures all kept weights; what is already there is not done again.

    Arms of one seed share initial weights, data order and noise stream.

    Args:
        images: Training images, which are also the reference of the distances.
        inputs: Name and sha256 of the data.
        run: Folder of the study; each training gets a run of its own below `arms/`.
        arms: What to compare; "vanilla" is the baseline of the ratios.
        seeds: Of the trainings.
        settings: Of every training.
        evaluation: Of every measurement.
        runtime: Device, precision, processes; its seed is not used.
        classifier: Feature extractor; by default one is trained on the images' labels, once.
        couplings: By arm name, couplings that replace the arm's own.
    """
    evaluator = make_evaluator(images, run, evaluation, runtime, classifier)
    scores: list[Score] = []
    recipes: list[Recipe] = []
    for seed in seeds:
        for arm in arms:
            own = (couplings or {}).get(arm.name)
            with open_training(run, inputs, arm, settings, seed) as training:
                recipe = train(images, training, arm, settings, replace(runtime, seed=seed), pair_noise=own)
                scores += measure(evaluator, recipe, training.folder, run, evaluation)
                training.finish({"arm": arm.name, "seed": seed})
            recipes.append(recipe)
    floor = evaluator.floor()
    study = Comparison(scores, evaluator.description, floor.value, floor.n, recipes)
    _save_grids(study, run, evaluator.device)
    study.save(run)
    return study


def evaluate_training(
    training: Path, images: ImageSet, run: Run, evaluation: EvaluationSettings, runtime: Runtime
) -> Comparison:
    """Measures one trained model and saves the result in `run`.

    Raises:
        UserError: `training` is no finished training run.
    """
    recipe = read_recipe(training)
    if images.images.shape[1:] != recipe.shape:
        size, wanted = (f"{c}x{h}x{w}" for c, h, w in (images.images.shape[1:], recipe.shape))
        raise UserError(
            f"the model makes {wanted} images, the data are {size}; give --size {recipe.shape[1]}"
            + (" and --grey" if recipe.shape[0] == 1 else "")
        )
    if recipe.num_classes is not None and (images.labels is None or len(images.classes) != recipe.num_classes):
        raise UserError(
            f"the model is conditioned on {recipe.num_classes} classes, the data have {len(images.classes)}; "
            "give images with one sub-folder for each class that it was trained on"
        )
    if evaluation.eta > 0 and recipe.arm.method != "vanilla":
        _LOG.warning(
            "this model was trained on %s noise: its output is no score, and stochastic sampling (eta %g) is biased",
            recipe.arm.name,
            evaluation.eta,
        )
    evaluator = make_evaluator(images, run, evaluation, runtime)
    scores = measure(evaluator, recipe, training, run, evaluation)
    floor = evaluator.floor()
    study = Comparison(scores, evaluator.description, floor.value, floor.n, [recipe])
    study.save(run)
    return study


def make_evaluator(
    images: ImageSet,
    run: Run,
    evaluation: EvaluationSettings,
    runtime: Runtime,
    classifier: TrainedClassifier | None = None,
) -> Evaluator:
    """Returns the evaluator of a study; without a classifier, the study's own is trained or read."""
    return Evaluator(
        images,
        classifier or shared_classifier(images, run, runtime),
        device=runtime.torch_device,
        num_samples=evaluation.num_samples,
        batch_size=evaluation.sampling_batch,
    )


def measure(
    evaluator: Evaluator, recipe: Recipe, training: Path, store: Run, evaluation: EvaluationSettings
) -> list[Score]:
    """Returns the scores of all kept weights of a training; those that `store` holds are read, not computed."""
    scores: list[Score] = []
    for step in recipe.settings.snapshot_steps:
        key = f"score-{recipe.arm.name}-seed{recipe.seed}-{step}"
        if store.missing([key]):
            denoiser = load_snapshot(recipe, training, step, evaluator.device)
            measured = [
                evaluator.score(denoiser, recipe, step, steps, eta=evaluation.eta)
                for steps in evaluation.sampling_steps
            ]
            store.save(key, {}, scores=as_rows(measured))
        scores += [Score(**row) for row in store.load(key).fields["scores"]]
    return scores


def open_training(study: Run, inputs: dict[str, str], arm: Arm, settings: TrainSettings, seed: int) -> Run:
    """Opens the run of one training inside a study."""
    folder = study.folder / "arms" / f"{arm.name}-seed{seed}"
    config = {**asdict(arm), **asdict(settings), "seed": seed}
    return Run.open(
        folder, command="immiscible-noise train", config=config, inputs=inputs, volatile=["checkpoint_every"]
    )


def shared_classifier(images: ImageSet, run: Run, runtime: Runtime) -> TrainedClassifier | None:
    """Returns the study's feature extractor, trained once on the images' labels.

    None without labels, and where the classifier learnt nothing from them.
    """
    if images.labels is None:
        return None
    device = runtime.torch_device
    if run.missing(["classifier"]):
        trained = train_classifier(images.images, images.labels, len(images.classes), device=device)
        run.save("classifier", trained.network.state_dict(), accuracy=trained.accuracy, weights_sha256=trained.sha256)
    part = run.load("classifier")
    most_frequent = float(images.labels.bincount().max()) / len(images)
    if part.fields["accuracy"] < most_frequent + _LEAST_LEARNT:
        _LOG.warning(
            "the classifier reached a held-out accuracy of %.1f %%, the most frequent label has %.1f %%: its features "
            "mean nothing, distances are taken in principal components of the pixels",
            100 * part.fields["accuracy"],
            100 * most_frequent,
        )
        return None
    _, channels, size, _ = images.images.shape
    network = Classifier(channels, size, len(images.classes))
    network.load_state_dict(part.tensors)
    network.to(device).eval().requires_grad_(False)
    return TrainedClassifier(network, part.fields["accuracy"], part.fields["weights_sha256"])


def _save_grids(study: Comparison, run: Run, device: torch.device) -> None:
    """Keeps samples of every arm from equal noise, of the first seed and the last weights, at the fewest steps."""
    steps = study.sampling_steps()[0]
    grids = {}
    for recipe in study.recipes:
        if recipe.arm.name in grids:
            continue
        training = run.folder / "arms" / f"{recipe.arm.name}-seed{recipe.seed}"
        denoiser = load_snapshot(recipe, training, recipe.settings.snapshot_steps[-1], device)
        labels = None if recipe.num_classes is None else torch.arange(_GRID) % recipe.num_classes
        grids[recipe.arm.name] = generate(denoiser, recipe, _GRID, steps, labels=labels)
    run.save("grids", grids, sampling_steps=steps)
