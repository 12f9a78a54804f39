"""The command that says what a space, its edits and its samples are worth: evaluate."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from diffcore.cli import Flag, Job, Output
from diffcore.errors import UserError, printable
from w2w_space.app.options import AskedFor, Drawing, ScorerName, SpacePath

if TYPE_CHECKING:
    from torch import Tensor

    from diffcore.models import DiffusionModel
    from diffcore.run import Run
    from w2w_space.labels import Labels
    from w2w_space.population import Population
    from w2w_space.space import WeightSpace

DirectionsPath = Annotated[Path | None, Parameter(help="Run folder of directions, whose edits are judged.")]
_FITTED = 0.8  # of the population, where held-out members judge
_INVERSION_STEPS = 200


def evaluate(
    space: SpacePath,
    model: Annotated[str | None, Parameter(help="Model that draws pictures; without one, coordinates alone.")] = None,
    *,
    directions: DirectionsPath = None,
    scorer: ScorerName = None,
    attribute: AskedFor = (),
    features: str | None = None,
    mask: Path | None = None,
    strength: float = 2.0,
    keep_others: Flag = False,
    subjects: int = 4,
    num: int = 8,
    labels: Path | None = None,
    population: Path | None = None,
    scaling: str | None = None,
    parts: int = 3,
    inversions: int = 0,
    drawing: Drawing = Drawing(),
    output: Output = Output(),
) -> int:
    """Judge a space: its edits and samples by their pictures, and what more members would bring.

    Shortest form: w2w-space evaluate SPACE

    Edits need MODEL, --directions and --scorer; identity and diversity need --features. With --scaling 16,32,64,all
    spaces of so many members are compared, which needs --labels. What is not given is left out.

    Args:
        features: Network whose features tell subjects apart, such as zoo:portraits-oracle, dino:FOLDER or clip:FOLDER.
        mask: Picture whose white marks the background, which edits should leave alone.
        strength: Strength of the edits in standard deviations.
        keep_others: Hold the scores of all other directions in each edit.
        subjects: Number of members, spread over the population, that are edited, or that judge as held-out ones.
        num: Number of samples that are compared with the members.
        labels: CSV file of the members' labels, for --scaling.
        population: Folder of the members; by default that which build kept beside the space.
        scaling: Numbers of members to compare, such as 16,32,64,all.
        parts: Number of random parts of the population of each size.
        inversions: Number of held-out members that each size finds again from one picture; needs MODEL and --features.
    """
    from diffcore.cli.app import settings
    from diffcore.io.files import sha256
    from w2w_space.app.report import write_page
    from w2w_space.files.space import load_space

    if subjects < 1 or num < 2 or parts < 1 or inversions < 0:
        raise UserError("`subjects` and `parts` must be at least 1, `num` at least 2, and `inversions` at least 0")
    if scaling is not None and labels is None:
        raise UserError("`scaling` compares how well labels are told; give `labels`")
    for name, value in (("directions", directions), ("features", features), ("mask", mask)):
        if value is not None and model is None:
            raise UserError(f"`{name}` judges pictures; give a model that draws them")
    if directions is not None and scorer is None:
        raise UserError("`directions` are judged by their pictures; give a `scorer`")
    if inversions and (features is None or scaling is None):
        raise UserError("`inversions` are compared for each size of `scaling`, by `features`; give both")
    loaded = load_space(space)
    if not loaded.names:
        raise UserError("the space was written without its members, which it is judged by; build it with them")
    place = population or _beside(space)
    given = settings(
        **{"space": space, "model": model, "directions": directions, "scorer": scorer, "attribute": list(attribute)},
        **{"features": features, "mask": mask, "strength": strength, "keep_others": keep_others, "subjects": subjects},
        **{"num": num, "labels": labels, "population": population, "scaling": scaling, "parts": parts},
        inversions=inversions,
        drawing=drawing,
    )
    told = _Told(loaded, space, place, drawing)
    if model is not None:
        told.load_model(model)
    told.prepare(directions, scorer, attribute, features, mask, labels, scaling)
    files = {printable(path.name): sha256(path) for path in (mask, labels) if path is not None}

    def compute(run: "Run", map: Any) -> Mapping[str, Any]:
        del map
        found: dict[str, Any] = {}
        if told.directions is not None:
            found |= told.judge_edits(run, strength, subjects, keep_others=keep_others)
        found |= told.judge_samples(run, num)
        if told.population is not None and told.model is not None:
            found |= told.judge_projections(run, subjects)
        if told.sizes:
            found |= told.judge_sizes(run, parts, inversions)
        return {"answer": _answer(found), **found}

    job = Job(
        "w2w-space evaluate",
        output.out or Path("runs") / f"evaluate-{space.stem}",
        output,
        given,
        {"space": loaded.fingerprint, **files, **told.inputs},
    )
    plan = {"members": len(loaded.names), "sizes": told.sizes, "edits": "no" if directions is None else "yes"}
    return job(compute, plan=plan, report=write_page)


class _Told:
    """What a command line named, read and checked before anything is computed."""

    def __init__(self, space: "WeightSpace", place: Path, population: Path | None, drawing: Drawing) -> None:
        self.space, self.place, self.drawing = space, place, drawing
        self.model: DiffusionModel | None = None
        self.options: dict[str, Any] = {}
        self.inputs: dict[str, str] = {}
        self.directions: Any = None
        self.scorer: Any = None
        self.features: Any = None
        self.mask: Tensor | None = None
        self.labels: Labels | None = None
        self.sizes: list[int] = []
        self.population: Population | None = None
        if population is not None:
            from w2w_space.files.population import PopulationFolder

            opened = PopulationFolder.open(population).population()
            missing = [name for name in self.space.names if name not in opened.names]
            if missing:
                raise UserError(f"{printable(population, 300)} has no member {printable(missing[0])!r} of the space")
            self.population = opened.subset([opened.names.index(name) for name in self.space.names])

    def load_model(self, name: str) -> None:
        from w2w_space.app.drawing import drawing_model

        self.model, self.options = drawing_model(name, self.drawing)
        self.inputs[self.model.name] = self.model.fingerprint

    def prepare(
        self,
        directions: Path | None,
        scorer: str | None,
        attribute: Sequence[str],
        features: str | None,
        mask: Path | None,
        labels: Path | None,
        scaling: str | None,
    ) -> None:
        from w2w_space.app.drawing import features_named, mask_at, scorer_named
        from w2w_space.files.directions import load_directions
        from w2w_space.files.labels import read_labels
        from w2w_space.scaling import sizes_of

        if directions is not None and scorer is not None:
            self.directions = load_directions(directions, self.space)
            self.scorer = scorer_named(scorer, attribute, self.drawing.device)
        if features is not None:
            self.features = features_named(features, self.drawing.device)
        if mask is not None:
            self.mask = mask_at(mask)
        if labels is not None:
            self.labels = read_labels(labels, self.space)
        if scaling is not None and self.labels is not None:
            if self.population is None:
                raise UserError("`scaling` fits spaces to parts of the members; give their `population`")
            known = int(self.labels.known(range(len(self.labels.attributes))).sum())
            self.sizes = sizes_of(scaling.split(","), known - max(1, known // 5))

    def spread(self, count: int) -> list[int]:
        """Returns places of members, spread over the population."""
        import torch

        n = len(self.space.members)
        return torch.linspace(0, n - 1, min(count, n)).round().long().tolist()

    def judge_edits(self, run: "Run", strength: float, subjects: int, *, keep_others: bool) -> dict[str, Any]:
        import torch

        from w2w_space.app.report_evaluate import keep_edits
        from w2w_space.evaluate import evaluate_edits

        assert self.model is not None  # by the command's checks
        shown: dict[str, Tensor] = {}
        found = evaluate_edits(
            self.model,
            [self.space.point(self.space.members[place]) for place in self.spread(subjects)],
            self.directions,
            self.scorer,
            strengths=strength,
            keep_others=keep_others,
            features=self.features,
            mask=self.mask,
            on_edit=lambda name, pictures: shown.update({name: pictures[:, 0, 0]}),
            **self.options,
        )
        names = ["before", *(row.name for row in found.rows)]
        pictures = torch.stack([shown[""], *(shown[row.name] for row in found.rows)])
        keep_edits(run, found, pictures, names)
        best = max(found.rows, key=lambda row: row.effect)
        return {
            "edits": {row.name: {"effect": row.effect, "leak": row.leak, "leaked": row.leaked} for row in found.rows},
            "identity": {row.name: row.identity for row in found.rows},
            "identity_of_one": found.same,
            "identity_of_two": found.different,
            "best_edit": best.name,
        }

    def judge_samples(self, run: "Run", num: int) -> dict[str, Any]:
        from w2w_space.app.report_evaluate import keep_sample_scores
        from w2w_space.evaluate import evaluate_samples
        from w2w_space.sample import sample

        points = [one.point for one in sample(self.space, num)]
        found = evaluate_samples(self.space, points, self.model, features=self.features, **self.options)
        keep_sample_scores(run, found)
        return {
            "sample_to_member": float(found.nearest.median()),
            "member_to_member": float(found.members_nearest.median()),
            "diversity": found.diversity,
            "diversity_of_members": found.members_diversity,
        }

    def judge_projections(self, run: "Run", subjects: int) -> dict[str, Any]:
        """Keeps how much of the gain of held-out members' adapters is left in their projections."""
        from w2w_space.app.report_evaluate import keep_gains
        from w2w_space.held_out import gain_kept
        from w2w_space.space import WeightSpace

        assert self.population is not None  # by the caller
        assert self.model is not None
        fitted, judges = _parted(len(self.population), subjects)
        space = WeightSpace.build(self.population.subset(fitted), gauge=self.space.gauge.kind)
        vectors = self.population.vectors.rows(judges)
        _, instances = self._drawn(judges, vectors)
        found = gain_kept(space, self.model, vectors, instances)
        keep_gains(run, found)
        components, factor = found.chosen
        best = float(found.gain_kept[found.components.index(components)].max())
        told = {"gain_kept": best, "gain_at_components": components, "lengthened_by": factor} if found.gain else {}
        return {"gain_of_own": found.gain, **told}

    def judge_sizes(self, run: "Run", parts: int, inversions: int) -> dict[str, Any]:
        from w2w_space.app.report_evaluate import keep_sizes
        from w2w_space.scaling import scaling

        assert self.population is not None  # by `prepare`
        assert self.labels is not None
        rows = scaling(self.population, self.labels, self.sizes, parts=parts, gauge=self.space.gauge.kind)
        identities = self._identities(inversions) if inversions else {}
        keep_sizes(run, self.labels.attributes, rows, identities)
        return {
            "r2": {str(row.members): float(row.r2.mean()) for row in rows},
            "cosines": {str(row.members): float(row.cosines.mean()) for row in rows},
            "identity_by_members": {str(size): value for size, value in identities.items()},
        }

    def _identities(self, count: int) -> dict[int, float]:
        """Returns how alike the pictures of inverted points are to those of the held-out members' own adapters."""
        from w2w_space.evaluate import recognised
        from w2w_space.invert import InversionSettings, invert
        from w2w_space.space import WeightSpace

        assert self.population is not None  # by `prepare`
        assert self.model is not None  # by the command's checks
        fitted, judges = _parted(len(self.population), count)
        truth, instances = self._drawn(judges, self.population.vectors.rows(judges))
        one = [_first_picture(instance) for instance in instances]
        settings = InversionSettings(steps=_INVERSION_STEPS)
        found: dict[int, float] = {}
        for size in self.sizes:
            space = WeightSpace.build(self.population.subset(fitted[:size]), gauge=self.space.gauge.kind)
            points = invert(space, self.model, one, settings).points
            alike = recognised(self.model, points, truth, features=self.features, **self.options)
            found[min(size, len(fitted))] = float(alike.mean())
        return found

    def _drawn(self, members: Sequence[int], vectors: "Tensor") -> "tuple[Tensor, list[Any]]":
        """Returns what members draw, and the same as subjects for training, under the first condition."""
        import torch

        from w2w_space.instance import Instance
        from w2w_space.render import render_vectors

        assert self.model is not None  # by the callers
        model = self.model
        pictures = render_vectors(model, self.space.layout, vectors, **self.options)
        seeds = len(self.options["seeds"])
        if "prompts" in self.options:
            assert model.prompts is not None  # by `drawing_model`
            rows = dict(model.prompts(self.options["prompts"]))
        elif "labels" in self.options:
            rows = {"class_labels": torch.tensor(self.options["labels"])}
        else:
            rows = model.empty_condition(1)
        condition = {key: value.repeat_interleave(seeds, 0) for key, value in rows.items()}
        names = [self.space.names[member] for member in members]
        subjects = [
            Instance(name, model.codec.encode(some.flatten(0, 1).to(model.device)), condition)
            for name, some in zip(names, pictures, strict=True)
        ]
        return pictures, subjects


def _first_picture(subject: Any) -> Any:
    from dataclasses import replace

    return replace(subject, x0=subject.x0[:1], condition={k: v[:1] for k, v in subject.condition.items()})


def _parted(count: int, judges: int) -> tuple[list[int], list[int]]:
    """Returns places of members in random order: those that spaces are fitted to, and those that judge."""
    import torch

    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    fitted = min(count - judges, max(3, round(_FITTED * count)))
    if fitted < 3:
        raise UserError(f"{count} members are too few for {judges} held-out `subjects` beside a space; take fewer")
    return order[:fitted], order[fitted : fitted + judges]


def _beside(space: Path) -> Path | None:
    """Returns the population that build kept beside a space."""
    from w2w_space.app.inputs import is_population

    folder = space if space.is_dir() else space.parent
    return folder / "population" if is_population(folder / "population") else None


def _answer(found: Mapping[str, Any]) -> str:
    """Returns the result in a sentence, about the pictures of edits where there are any, or what comes next to them."""
    if "edits" in found:
        best = found["edits"][found["best_edit"]]
        return (
            f"The edit of {found['best_edit']} changes its own score by {best['effect']:+.2f}, and {best['leaked']}, "
            f"which changes most beside it, by {best['leak']:.2f}."
        )
    if "r2" in found:
        rows = list(found["r2"].items())
        (few, low), (many, high) = rows[0], rows[-1]
        return f"Labels of new members are told with R² of {low:.2f} from {few} members, and {high:.2f} from {many}."
    if found.get("gain_of_own", 0) > 0:
        return (
            f"{found['gain_at_components']} components keep {found['gain_kept']:.0%} of what new adapters gain in "
            "denoising."
        )
    return (
        f"Samples are {found['sample_to_member']:.1f} standard deviations from their nearest member, and members "
        f"{found['member_to_member']:.1f} from theirs."
    )
