"""What the parts of the study of NeMo on the zoo share: a model, what it memorised, and what localization finds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from diffcore.io.shipped import shipped_folder
from diffcore.metrics.attribute_network import load_attribute_network
from diffcore.models import DiffusionModel
from diffcore.run import Run, RunMap
from diffcore.zoo import Memorised
from diffcore.zoo.oracle import accuracies
from diffcore.zoo.portraits.captions import describe, ordinary_captions, same_form_captions
from diffcore.zoo.portraits.gates import PortraitsJudge
from diffcore.zoo.portraits.judge import labels_of
from diffcore.zoo.portraits.people import People, portraits, select
from diffcore.zoo.portraits.pictures import held_out_pictures
from diffcore.zoo.portraits.planted import planted, verbatim_people
from nemo_localize import (
    FirstStep,
    ImageSettings,
    NeuronSet,
    StepSettings,
    calibrate,
    collect_statistics,
    generate,
    localize,
    minimal_set,
)
from nemo_localize.calibrate import Calibration
from nemo_localize.confirm import confirm, likenesses
from nemo_localize.likeness import likeness
from nemo_localize.minimal_set import GlobalEdit, within_budget
from nemo_localize.protocol import COPY_ABOVE
from nemo_localize.results import Results
from nemo_localize.settings import FIRST_IMAGE_SEED, Mitigation

ATTRIBUTES = ("background", "skin", "style", "hair", "beard", "hat", "gender", "glasses")


@dataclass(frozen=True)
class Size:
    """How much is looked at.

    Attributes:
        items: Verbatim items.
        seeds: Images per caption.
        near_seeds: Likewise, for near misses.
        steps: Of each image; fewer begin so early that memories fade.
        references: Captions of each of two kinds whose activations are usual.
        calibration: Captions of each of two kinds that set and check the threshold.
        others: Captions of each class that is no memory.
        budgeted: Ordinary captions that the minimal set must spare.
        followed: Ordinary captions whose images the oracle reads, for one edit.
        mitigated: Likewise, for every way of mitigation.
        repeats: Draws of the ways that draw at random.
        verified: Number of items that are verified.
    """

    items: int = 24
    seeds: int = 4
    near_seeds: int = 2
    steps: int = 25
    references: int = 500
    calibration: int = 150
    others: int = 60
    budgeted: int = 48
    followed: int = 100
    mitigated: int = 40
    repeats: int = 2
    verified: int = 2


SMOKE = Size(2, 2, 1, 10, 40, 8, 4, 4, 8, 4, 1, 1)


@dataclass(frozen=True)
class Study:
    """One model under study. What is costly is computed on demand, and kept in the run."""

    model: DiffusionModel
    truth: Memorised
    size: Size
    run: Run

    @cached_property
    def step(self) -> FirstStep:
        """The first step that localization looks at."""
        return FirstStep(self.model, StepSettings())

    @cached_property
    def captions(self) -> list[str]:
        """The verbatim items'."""
        return [item.caption for item in self.truth.verbatim[: self.size.items]]

    @cached_property
    def originals(self) -> dict[str, Tensor]:
        """The image of each of them."""
        return {caption: self.truth.verbatim_images[i : i + 1] for i, caption in enumerate(self.captions)}

    def ordinary(self, seed: int, count: int) -> list[str]:
        """Returns ordinary captions, planted ones and decoys left out."""
        return ordinary_captions(portraits(50 + seed, range(count)), seed, planted().captions)

    def same_form(self, seed: int, count: int) -> list[str]:
        """Returns captions of the planted form that were never planted."""
        return same_form_captions(count, 20 + seed, planted().captions)

    def full(self, seed: int, count: int) -> list[str]:
        """Returns captions that say all there is to say of an image."""
        return describe(portraits(50 + seed, range(count)), full=True)

    @cached_property
    def budgeted(self) -> list[str]:
        """Ordinary captions that the minimal set must spare; not those that set the threshold."""
        return self.ordinary(2, self.size.budgeted)

    @cached_property
    def calibration(self) -> Calibration:
        """The paper's threshold: half of the captions have the memories' form."""
        count = self.size.calibration
        return calibrate(self.step, self.ordinary(1, count) + self.same_form(1, count), map=RunMap(self.run))

    @cached_property
    def results(self) -> Results:
        """Results of localization for all verbatim items."""
        count = self.size.references
        references = self.ordinary(0, count) + self.same_form(0, count)
        statistics = collect_statistics(self.model, references, source="ordinary and same form")
        tau, kept = self.calibration.tau, RunMap(self.run)
        return localize(self.step, self.captions, tau=tau, statistics=statistics, map=kept)

    @cached_property
    def own(self) -> dict[str, NeuronSet]:
        """Each localized item's refined neurons."""
        return self.results.by_caption()

    @cached_property
    def common(self) -> GlobalEdit:
        """The minimal set for all items, within the package's budget."""
        tau = self.calibration.tau
        return minimal_set(self.step, self.results, self.budgeted, tau=tau, progress=_told)

    @cached_property
    def confirmed(self) -> tuple[NeuronSet, list[str]]:
        """That set as images have it, and the captions that asked for more."""
        return confirm(
            self.model,
            self.results,
            self.common.neurons,
            self.captions,
            range(2001, 2001 + self.size.seeds),  # what is reported must not be what was selected on
            judge=likeness(),
            settings=self.settings(),
            map=RunMap(self.run),
            originals=self.originals,
            affordable=within_budget(self.step, self.budgeted),
        )

    def settings(self, guidance_scale: float = 1.0) -> ImageSettings:
        """Returns how images are generated: captions that say nothing without guidance."""
        return ImageSettings(guidance_scale, self.size.steps)

    def images(
        self,
        prompts: Sequence[str],
        mitigations: Sequence[Mitigation],
        neurons: NeuronSet | Mapping[str, NeuronSet],
        *,
        repeat: int = 0,
        seeds: int | None = None,
        guidance_scale: float = 1.0,
    ) -> dict[str, Tensor]:
        """Returns images by way: (prompts, seeds, 3, 32, 32)."""
        numbers = range(FIRST_IMAGE_SEED, FIRST_IMAGE_SEED + (seeds or self.size.seeds))
        return generate(
            self.model,
            prompts,
            numbers,
            mitigations=mitigations,
            neurons=neurons,
            settings=self.settings(guidance_scale),
            repeat=repeat,
            map=RunMap(self.run),
        )

    def similarity(self, images: Tensor, owners: Sequence[int] | None = None) -> Tensor:
        """Returns the SSIM of images to the originals of their items: prompts x seeds."""
        prompts = [self.captions[i] for i in owners or range(len(self.captions))]
        return likenesses(likeness(), prompts, images, images, self.originals)

    def shown(self, images: Tensor) -> float:
        """Returns the share of attributes of the planted persons that images of their items show."""
        rows = torch.arange(len(images)).repeat_interleave(images.shape[1])
        return self.read(images.flatten(0, 1), select(verbatim_people(), rows))

    def read(self, images: Tensor, people: People) -> float:
        """Returns the mean over attributes of how often images show what people are like, as the oracle reads it."""
        found = accuracies(self.judge.oracle, images, labels_of(people))
        return sum(found[name] for name in ATTRIBUTES) / len(ATTRIBUTES)

    @cached_property
    def judge(self) -> PortraitsJudge:
        """The oracle."""
        return PortraitsJudge(load_attribute_network(shipped_folder("portraits-oracle")))

    def followed(self, model: DiffusionModel) -> float:
        """Returns how often a model's images of ordinary, full captions show what these say."""
        found = self.judge.followed(model, self.size.followed)
        return sum(found[name] for name in ATTRIBUTES) / len(ATTRIBUTES)

    @cached_property
    def strangers(self) -> People:
        """People with ordinary, full captions, for every way of mitigation."""
        return select(held_out_pictures(self.size.mitigated).people, slice(self.size.mitigated))


def _told(what: str, count: int) -> None:
    print(f"  {count} neurons: {what}", flush=True)


def share(similarity: Tensor) -> float:
    """Returns the share of copies."""
    return float((similarity > COPY_ABOVE).double().mean())
