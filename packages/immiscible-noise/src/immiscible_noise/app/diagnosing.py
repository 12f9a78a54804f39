"""The command diagnose: measurements of samples, pictures of them, and the options of `train` that follow."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffcore.errors import UserError, printable
from diffcore.models import load
from diffcore.run import Run
from diffcore.runtime import Runtime
from immiscible_noise.app.samples import Samples
from immiscible_noise.coupling import PRESETS
from immiscible_noise.study.diagnosis import Pictures, diagnose_samples

_LOG = logging.getLogger("diffcore.immiscible_noise")


@dataclass(frozen=True)
class Shown:
    """How samples are shown.

    Attributes:
        pictures: Turns samples into pictures; None shows the means of their channels.
        called: Words that say what the pictures are.
    """

    pictures: Pictures | None
    called: str


def shown_samples(samples: Samples, model: str | None, runtime: Runtime) -> Shown:
    """Returns how samples are shown: images as they are, latents decoded or as the means of their channels.

    Args:
        samples: Samples that are diagnosed.
        model: Name of the model whose codec decodes latents.
        runtime: Device and precision of the codec.

    Raises:
        UserError: A model is given for images, its latents have another shape, or there are several shapes.
    """
    x0 = samples.table
    if samples.scale is not None:
        if model is not None:
            raise UserError("--model decodes latents; images need none, leave it out")
        return Shown(samples.scale.decode, "images")
    if model is None:
        return Shown(None, "channel mean")
    loaded = load(model, runtime)
    if x0.ndim != 4 or x0.shape[1] != loaded.shape[0]:
        raise UserError(f"{printable(loaded.name)} decodes latents of {loaded.shape[0]} channels, not {samples.shapes}")

    def decoded(x0: Tensor) -> Tensor:
        return loaded.codec.decode(x0.to(loaded.device))

    return Shown(decoded, "decoded latent")


def diagnose_data(
    samples: Samples, run: Run, batch_sizes: Sequence[int], k: int, seed: int, shown: Shown
) -> dict[str, Any]:
    """Measures what assigning noise does to samples and returns the figures, with the options that follow from them.

    Args:
        samples: Samples that are diagnosed.
        run: Run folder that receives the parts.
        batch_sizes: Batch sizes that are tried.
        k: Number of draws per sample for nearest-of-k selection.
        seed: Number that fixes batches and noise.
        shown: How samples are shown.
    """
    if beyond := [size for size in batch_sizes if size > len(samples.table)]:
        told, rest = " and ".join(map(str, beyond)), "" if len(beyond) < len(batch_sizes) else "; took all at once"
        _LOG.info("left out batch sizes of %s: there are %d samples%s", told, len(samples.table), rest)
    result = diagnose_samples(
        samples.table, samples.labels, run, batch_sizes, k, seed, pictures=shown.pictures, shown_as=shown.called
    )
    advice = PRESETS[result["coupling"]]
    options = f"--method {advice.method}"
    if advice.method == "assignment":
        conditional = "" if samples.latents else " --class-conditional"
        labelled = "" if samples.labels is None else f"{conditional} --condition block"
        options += f" --strength {advice.strength:g}{labelled}"
    return {"options_of_train": options, **result}
