"""Preparing a comparison from the user's arguments: everything is checked before the first image is read."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffcore.data.prompts import load_prompts
from diffcore.data.source import MAX_PIXELS, ImageSource, list_images
from diffcore.errors import UserError, printable
from diffcore.metrics.compare import compare_images, named
from diffcore.metrics.embed import Progress, Reading, num_parts
from diffcore.metrics.features import DEFAULT_FEATURES, FeatureExtractor, feature_extractor
from diffcore.metrics.page import summary, write_page
from diffcore.metrics.prompt_fit import ScoredPrompts, clip_text
from diffcore.metrics.statistics_file import read_statistics
from diffcore.run import Run, input_hash
from diffcore.runtime import Runtime
from diffcore.stats import Covariance

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A comparison of image sets whose inputs are all opened and checked.

    Attributes:
        real: The real images, or statistics of them.
        fake: The generated images, not yet read.
        extractors: Networks whose features are compared.
        prompts: Prompts of the generated images; None without prompts.
        reading: Device, batch size and limits for reading images.
        digests: Digests of both image sets, by "real" and "fake".
        config: Settings that identify the run.
        inputs: Digests of everything that is read.
    """

    real: ImageSource | Covariance
    fake: ImageSource
    extractors: tuple[FeatureExtractor, ...]
    prompts: ScoredPrompts | None
    reading: Reading
    digests: Mapping[str, str]
    config: Mapping[str, Any]
    inputs: Mapping[str, str]

    def plan(self) -> dict[str, Any]:
        """Returns the numbers of files, parts and prompts to process, for a dry run."""
        sources = [s for s in (self.real, self.fake) if isinstance(s, ImageSource)]
        files = {source.path: len(source.names) for source in sources}
        return {
            "real_files": len(self.real.names) if isinstance(self.real, ImageSource) else "statistics",
            "fake_files": len(self.fake.names),
            "features": [extractor.name for extractor in self.extractors],
            "prompts": 0 if self.prompts is None else len(self.prompts.prompts),
            "parts": len(self.extractors) * sum(map(num_parts, files.values())),
        }

    def measure(self, run: Run, progress: Progress) -> dict[str, Any]:
        """Compares, writes tables and report into the run folder, and returns the result."""
        compared = compare_images(
            self.real,
            self.fake,
            self.extractors,
            run,
            self.reading,
            digests=self.digests,
            prompts=self.prompts,
            seed=self.config["seed"],
            progress=progress,
        )
        for found in (compared.real, compared.fake):
            for name, reason in found.skipped if found else ():
                _LOG.warning("left out %s: it %s", printable(name), printable(reason, 200))
        result = summary(compared)
        real = self.real if isinstance(self.real, ImageSource) else None
        write_page(compared, real, self.fake, run, self.prompts)
        return {**result, "features": {e.name: e.sha256 for e in self.extractors}}


def prepare(
    real: Path,
    fake: Path,
    features: Sequence[str],
    runtime: Runtime,
    *,
    prompts: Path | None = None,
    clip: Path | None = None,
    batch_size: int = 32,
    max_pixels: int = MAX_PIXELS,
    allow_pickle: bool = False,
    strict: bool = False,
) -> Prepared:
    """Opens and checks what a comparison needs; arguments as those of the command `diffcore metrics`.

    Raises:
        UserError: Something is missing, or does not go together.
    """
    for name, number in (("batch_size", batch_size), ("max_pixels", max_pixels)):
        if number < 1:
            raise UserError(f"`{name}` is {number}; give a number of at least 1")
    if runtime.devices * runtime.num_nodes > 1:
        raise UserError("metrics runs in one process; leave out `devices` and `num_nodes`")
    if runtime.dtype != "float32":
        raise UserError(f"`dtype` is {runtime.dtype}, but features are always float32; leave it out")
    judge = _judge(prompts, clip, features)
    found = list_images(fake)
    statistics = real.suffix == ".npz" and real.is_file()
    reference = read_statistics(real) if statistics else list_images(real)
    for source in (reference, found):
        for remark in source.remarks if isinstance(source, ImageSource) else ():
            _LOG.warning("%s", remark)
    names = [*(features or (DEFAULT_FEATURES,))]
    if statistics and len(names) > 1:
        raise UserError(f"{printable(real)} holds the statistics of one network; give one with `features`")
    loaded = {name: feature_extractor(name, runtime, allow_pickle=allow_pickle) for name in [*names, *judge]}
    scored, sums = None, {}
    if prompts is not None:
        read = load_prompts(prompts, strict=strict)
        for note in read.notes:
            _LOG.warning("%s", note)
        extractor = loaded[judge[0]]
        text = clip_text(extractor, Path(judge[0].partition(":")[2]))
        scored = ScoredPrompts.of(read, found.names, text)
        sums = {"prompts": read.sha256, "tokenizer": text.sha256}
    extractors = named(list(loaded.values()))
    digests = {"real": input_hash(real), "fake": input_hash(fake)}
    chosen = [extractor for extractor in extractors if extractor.sha256 in {loaded[name].sha256 for name in names}]
    return Prepared(
        reference,
        found,
        tuple(chosen),
        scored,
        Reading(runtime.torch_device, batch_size, strict, max_pixels),
        digests,
        {
            "features": [_without_folders(name) for name in names],
            "prompts": prompts,
            "clip": clip,
            "batch_size": batch_size,
            "max_pixels": max_pixels,
            "allow_pickle": allow_pickle,
            "strict": strict,
            "seed": runtime.seed,
        },
        {**digests, **{e.name: e.sha256 for e in extractors}, **sums},
    )


def _without_folders(name: str) -> str:
    """Returns an extractor's name without an absolute folder, which differs between machines."""
    kind, _, place = name.partition(":")
    return f"{kind}:{Path(place).name}" if Path(place).is_absolute() else name


def refuse_place(out: Path, inputs: Sequence[Path]) -> None:
    """Refuses a run folder inside the data folders, which writing would change.

    Raises:
        UserError: The run folder is, or lies in, one of the inputs.
    """
    for path in inputs:
        if out.resolve().is_relative_to(path.resolve()):
            raise UserError(f"`out` {printable(out, 300)} lies in {printable(path, 300)}, which is read; give another")


def _judge(prompts: Path | None, clip: Path | None, features: Sequence[str]) -> list[str]:
    """Returns the name of the CLIP extractor that scores prompts; nothing without prompts."""
    if prompts is None:
        if clip is not None:
            raise UserError("`clip` judges images by their prompts; give those with `prompts`")
        return []
    if clip is not None:
        return [f"clip:{clip}"]
    among = [name for name in features if name.startswith("clip:")]
    if not among:
        raise UserError("`prompts` needs a CLIP to judge by; give its folder with `clip`")
    return among[:1]
