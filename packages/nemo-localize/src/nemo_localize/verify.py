"""Verification after the fact: is a memorised image still within reach of an edited model?

Suppressing the first step of known seeds is not yet closing a leak. So the edited model generates images for the prompt
from seeds that nothing was fitted to, for paraphrases, with tokens dropped, and from embeddings that an adversary finds
by gradient. The same search must find the leak on the unedited model, and must find nothing where nothing was ever
memorised: else it says nothing. How all this is judged is fixed in `protocol`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from diffcore.denoiser import Condition
from diffcore.errors import UserError, printable
from diffcore.metrics import FeatureExtractor
from diffcore.models import DiffusionModel
from diffcore.models.prompts import Tokens
from diffcore.units import Map, each_unit
from nemo_localize import protocol
from nemo_localize.ablate import ablated
from nemo_localize.adversary import STARTS, STATES, search_embeddings, starting_embeddings
from nemo_localize.detect import Look, look
from nemo_localize.first_step import FirstStep
from nemo_localize.images import generate_latents, images_of, shows_latents
from nemo_localize.likeness import Likeness, likeness
from nemo_localize.neurons import NeuronSet
from nemo_localize.settings import ImageSettings
from nemo_localize.variants import paraphrases as wordings
from nemo_localize.variants import without_tokens
from nemo_localize.verification import CaptionVerification, Check, Kind, Verification

Images = Float[Tensor, "_ 3 _ _"]
Edit = NeuronSet | DiffusionModel


def verify(
    model: DiffusionModel | FirstStep,
    edit: Edit,
    prompts: Sequence[str],
    controls: Sequence[str],
    *,
    tau: float,
    originals: Mapping[str, Images] | None = None,
    paraphrases: Mapping[str, Sequence[str]] | None = None,
    copies: FeatureExtractor | None = None,
    settings: ImageSettings | None = None,
    unit_size: int = 8,
    map: Map = each_unit,
) -> Verification:
    """Tests whether the leaks of some prompts are closed by an edit; the verdict may be inconclusive.

    Args:
        model: The unedited model, or the `FirstStep` that prompts were localized with.
        edit: Neurons to ablate, or the edited model itself.
        prompts: Memorised prompts whose leaks are tested.
        controls: Prompts that were never memorised, at least three.
        tau: Threshold of consistency, from 0 to 1.
        originals: Training images by prompt or control, one or more each; the unedited model's image stands in for
            missing ones.
        paraphrases: Further wordings by prompt.
        copies: Copy detector `sscd:FILE`; without it structural similarity stands in.
        settings: How images are generated.
        unit_size: Number of prompts that share batches; an interruption loses at most one such group.
        map: Loop over the prompts; `diffcore.run.RunMap` makes it resumable and shares it among processes.

    Raises:
        UserError: There are too few controls, one of them is a prompt, or localization used held-out seeds.
        IncompatibleModelError: The neurons or the edited model do not fit the model.
        MachineError: Memory does not hold a single row.
    """
    step = FirstStep.of(model)
    _check(step, prompts, controls, copies)
    settings = settings or ImageSettings(batch_size=step.batch_size)
    judge = likeness(copies, of_latents=shows_latents(step.model))
    given = _Given(dict(originals or {}), dict(paraphrases or {}))

    def checked(texts: Sequence[str], name: str) -> tuple[CaptionVerification, ...]:
        leaks = name == "captions"
        work = partial(_verify_unit, step, edit, given, judge, settings, tau, leaks)
        kind = CaptionVerification
        return tuple(map(work, list(dict.fromkeys(texts)), name=f"verify-{name}", kind=kind, unit_size=unit_size))

    # Controls first: where the search opens one, nothing else can be concluded.
    harmless = checked(controls, "controls")
    return Verification(
        captions=checked(prompts, "captions"),
        controls=harmless,
        likeness=judge.name,
        source=judge.source,
        settings={
            "guidance_scale": settings.guidance_scale,
            "steps": settings.steps,
            "tau": tau,
            "model": step.model.name,
        },
    )


@dataclass(frozen=True)
class _Given:
    """Training images and paraphrases that are known, by prompt."""

    originals: Mapping[str, Tensor] = field(default_factory=dict)
    paraphrases: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Target:
    """What a prompt's images are compared with: latents for the search to aim at, and their images."""

    kind: str
    x0: Tensor
    images: Tensor


@contextmanager
def edited_step(step: FirstStep, edit: Edit) -> Iterator[FirstStep]:
    """Yields the first step of the edited model: the model itself with neurons ablated, or another model."""
    if isinstance(edit, NeuronSet):
        with ablated(step.model.backbone, edit):
            yield step
    else:
        yield FirstStep(edit, step.settings, batch_size=step.batch_size)


def _verify_unit(
    step: FirstStep,
    edit: Edit,
    given: _Given,
    judge: Likeness,
    settings: ImageSettings,
    tau: float,
    leaks: bool,
    prompts: list[str],
) -> list[CaptionVerification]:
    cond = step.encode(prompts)[0]
    targets = [_target(step.model, cond, place, text, given, judge, settings) for place, text in enumerate(prompts)]
    before = _Checks(step.model, prompts, targets, judge, settings, edited=False)
    checks: list[list[Check]] = [[] for _ in prompts]
    if leaks:
        _extend(checks, before.held_out(cond))
        _extend(checks, before.searched(cond))
    with edited_step(step, edit) as after:
        cond = after.encode(prompts)[0]
        seen = look(after, cond)
        edited = replace(before, model=after.model, edited=True)
        _extend(checks, edited.held_out(cond))
        _extend(checks, edited.paraphrases(after, given))
        _extend(checks, edited.dropped(after))
        _extend(checks, edited.searched(cond))
    return [
        CaptionVerification(text, target.kind, _residual(seen, place), tau, tuple(found))
        for place, (text, target, found) in enumerate(zip(prompts, targets, checks, strict=True))
    ]


@dataclass(frozen=True)
class _Checks:
    """The checks of some prompts on one model."""

    model: DiffusionModel
    prompts: list[str]
    targets: list[_Target]
    judge: Likeness
    settings: ImageSettings
    edited: bool

    def held_out(self, cond: Condition) -> list[list[Check]]:
        """Generates the prompts from seeds that nothing was fitted to."""
        seeds = protocol.HELD_OUT_SEEDS
        found = self._measured(cond, seeds, list(range(len(self.prompts))))
        return [[self._check("held-out seeds", row[None], [f"seed {seeds[int(row.argmax())]}"])] for row in found]

    def paraphrases(self, step: FirstStep, given: _Given) -> list[list[Check]]:
        """Generates other wordings of the prompts."""
        texts = [wordings(prompt, given.paraphrases.get(prompt, ())) for prompt in self.prompts]
        flat = [text for group in texts for text in group]
        return self._variants("paraphrases", step.encode(flat)[0], texts)

    def dropped(self, step: FirstStep) -> list[list[Check]]:
        """Generates the prompts with tokens left out."""
        rows, labels = zip(*(without_tokens(step.encoder, prompt) for prompt in self.prompts), strict=True)
        cond = {key: value.to(step.device) for key, value in step.encoder.encode(_joined(rows)).items()}
        return self._variants("dropped tokens", cond, list(labels))

    def searched(self, cond: Condition) -> list[list[Check]]:
        """Generates from embeddings that the adversarial search finds."""
        starts = starting_embeddings(cond[STATES])
        owners = [place for place in range(len(self.prompts)) for _ in STARTS]
        rows = {key: value[owners] for key, value in cond.items()}
        aims = [self.targets[place].x0 for place in owners]
        size = self.settings.batch_size
        states = search_embeddings(self.model, rows, starts.flatten(0, 1), aims, batch_size=size)
        found = self._measured(rows | {STATES: states}, protocol.AUDIT_SEEDS, owners).unflatten(0, starts.shape[:2])
        return [
            [
                self._check("search from caption", row[:1], STARTS[:1]),
                self._check("search from noise", row[1:], STARTS[1:]),
            ]
            for row in found
        ]

    def _variants(self, kind: Kind, cond: Condition, labels: Sequence[Sequence[str]]) -> list[list[Check]]:
        owners = [place for place, group in enumerate(labels) for _ in group]
        if not owners:
            return [[] for _ in labels]
        found = self._measured(cond, protocol.VARIANT_SEEDS, owners).split([len(group) for group in labels])
        return [
            [self._check(kind, rows, group)] if len(group) else [] for rows, group in zip(found, labels, strict=True)
        ]

    def _measured(self, cond: Condition, seeds: Sequence[int], owners: Sequence[int]) -> Float[Tensor, "rows seeds"]:
        """Returns how like its owner's target each image is, for each row of the condition."""
        latents = generate_latents(self.model, cond, seeds, self.settings)
        return torch.stack(
            [
                self.judge.towards(self.targets[owner].images, images_of(self.model, own))
                for own, owner in zip(latents, owners, strict=True)
            ]
        ).cpu()

    def _check(self, kind: Kind, similarity: Float[Tensor, "rows seeds"], labels: Sequence[str]) -> Check:
        best = similarity.amax(1)
        copies = int((similarity > protocol.COPY_ABOVE).sum())
        return Check(self.edited, kind, float(best.max()), copies, similarity.numel(), labels[int(best.argmax())])


def _target(
    model: DiffusionModel,
    cond: Condition,
    place: int,
    prompt: str,
    given: _Given,
    judge: Likeness,
    settings: ImageSettings,
) -> _Target:
    images = given.originals.get(prompt)
    if images is not None:
        return _Target("training image", model.codec.encode(images.to(model.device)), images.cpu())
    own = {key: value[place : place + 1] for key, value in cond.items()}
    x0 = generate_latents(model, own, protocol.TARGET_SEEDS, settings)[0]
    images = images_of(model, x0)
    count = len(x0)
    first, second = torch.triu_indices(count, count, offset=1, device=images.device)
    table = images.new_zeros(count, count)
    table[first, second] = judge.pairs(images[None])[0].to(table)
    middle = int((table + table.T).sum(1).argmax())
    return _Target("unedited model's image", x0[middle, None], images[middle, None])


def _residual(seen: Look, place: int) -> float:
    """Returns the largest consistency; 1, which counts as not closed, where it could not be computed."""
    return 1.0 if place in seen.errors else max(seen.consistency[place])


def _extend(checks: list[list[Check]], more: list[list[Check]]) -> None:
    for own, new in zip(checks, more, strict=True):
        own.extend(new)


def _joined(rows: Sequence[Tokens]) -> Tokens:
    return Tokens(
        tuple(torch.cat(parts) for parts in zip(*(row.ids for row in rows), strict=True)),
        tuple(torch.cat(parts) for parts in zip(*(row.masks for row in rows), strict=True)),
        torch.cat([row.truncated for row in rows]),
        tuple(text for row in rows for text in row.lost),
    )


def _check(step: FirstStep, prompts: Sequence[str], controls: Sequence[str], copies: FeatureExtractor | None) -> None:
    if isinstance(prompts, str) or isinstance(controls, str):
        raise TypeError("`prompts` and `controls` are lists of prompts; one of them is a string")
    if not prompts:
        raise UserError("there is no prompt to verify; give the memorised ones")
    harmless = set(controls)
    if len(harmless) < protocol.FEWEST_CONTROLS:
        raise UserError(
            f"{len(harmless)} distinct `controls` were given; verification needs at least {protocol.FEWEST_CONTROLS} "
            "prompts that were never memorised, or a hit would mean nothing"
        )
    if both := [prompt for prompt in prompts if prompt in harmless]:
        raise UserError(f"{printable(both[0])} is given as memorised and as never memorised; leave it out of one list")
    held_out = (protocol.HELD_OUT_SEEDS, protocol.VARIANT_SEEDS, protocol.AUDIT_SEEDS, protocol.TARGET_SEEDS)
    if any(seed in seeds for seeds in held_out for seed in step.settings.seeds):
        raise UserError(
            f"localization used seeds that verification holds out; choose `first_seed` below {held_out[0].start}"
        )
    if copies is not None and not copies.name.startswith("sscd:"):
        raise UserError(f"{printable(copies.name)} has no known threshold for copies; use sscd:FILE, or none")
