"""Inputs of commands: captions, thresholds, judges, training images."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffcore.digests import digest_of_values
from nemo_localize.app.options import Judging

if TYPE_CHECKING:
    from torch import Tensor

    from diffcore.data.prompts import PromptSet
    from nemo_localize.app.work import Work
    from nemo_localize.calibrate import Calibration
    from nemo_localize.evaluate import Judges, Kind
    from nemo_localize.neurons import NeuronSet

_LOG = logging.getLogger("diffcore.nemo_localize")


def read_captions(path: Path, strict: bool) -> "PromptSet":
    """Reads captions, and warns of lines that were left out."""
    from diffcore.data.prompts import load_prompts

    found = load_prompts(path, strict=strict)
    for note in found.notes:
        _LOG.warning("%s", note)
    return found


def column(captions: "PromptSet", name: str) -> tuple[str, ...]:
    """Returns a column of the captions by its name, in any case; empty cells where there is none."""
    return next((cells for key, cells in captions.columns.items() if key.lower() == name), ("",) * len(captions))


def read_kinds(captions: "PromptSet") -> "dict[str, Kind] | None":
    """Returns which captions their column `type` calls verbatim or template memories; None where none says so."""
    from nemo_localize.evaluate import kinds_of

    types = column(captions, "type")
    kinds = kinds_of(captions.prompts, types)
    if kinds is None and any(types):
        _LOG.warning("the column type says something else than VM or TM, and is not used")
    return kinds


def read_calibration(path: Path | None) -> "Calibration | None":
    """Reads a calibration, where one is given."""
    from nemo_localize.files.calibration import load_calibration

    return None if path is None else load_calibration(path)


def digest_of_neurons(together: "NeuronSet", by_caption: "Mapping[str, NeuronSet]") -> str:
    """Returns a digest of neurons that were read, whatever file they were in."""
    told = [together.to_json(), {prompt: neurons.to_json() for prompt, neurons in by_caption.items()}]
    return digest_of_values(told)


def load_judges(judging: Judging, work: "Work", *, distances: Sequence[str] = ()) -> "Judges":
    """Loads the networks that compare images.

    Args:
        judging: Options that name the networks.
        work: Options that say where they run.
        distances: Names of networks that compare sets of images; CLIP joins them where there is one.
    """
    from diffcore.metrics import FeatureExtractor, feature_extractor
    from diffcore.metrics.prompt_fit import clip_text
    from nemo_localize.evaluate import Judges

    def network(name: str) -> FeatureExtractor:
        return feature_extractor(name, work.runtime, allow_pickle=work.loading.allow_pickle)

    copies = judging.sscd and network(f"sscd:{judging.sscd}")
    quality = [network(name) for name in distances]
    if judging.clip is None:
        return Judges(copies=copies, quality=tuple(quality), batch_size=work.computing.batch_size)
    clip = network(f"clip:{judging.clip}")
    quality += [clip] if distances else []
    return Judges(copies, clip_text(clip, judging.clip), tuple(quality), work.computing.batch_size)


def load_originals(judging: Judging, captions: "PromptSet") -> "dict[str, Tensor]":
    """Returns the training images of captions, where a folder of them is given."""
    if judging.originals is None:
        return {}
    from diffcore.data import list_images, load_images
    from diffcore.data.pairing import places_of_prompts

    # An image that cannot be read keeps its place, so that those after it stay with their captions.
    names = list_images(judging.originals).names
    place_of = dict(zip(names, places_of_prompts(captions, names), strict=True))
    images = load_images(judging.originals)
    for note in (*images.notes, *(f"left out {name}: it {reason}" for name, reason in images.skipped)):
        _LOG.warning("%s", note)
    found: dict[str, list[int]] = {}
    for image, name in enumerate(images.names):
        if place_of[name] >= 0:
            found.setdefault(captions.prompts[place_of[name]], []).append(image)
    return {prompt: images.unit()[places] for prompt, places in found.items()}
