"""A Lightning callback that puts assigned noise into each training batch, for modules that use `batch["noise"]`."""

from collections.abc import MutableMapping
from typing import Any, Unpack

import lightning as L
import torch

from .assign import Options, assign_noise
from .batch import draw_noise, mixed_seed
from .ranks import assign_across_ranks


class ImmiscibleCallback(L.Callback):
    """Draws noise for each training batch and assigns it, before the module's `training_step` sees the batch.

    The noise follows from the seed, the index of the batch and the rank, so that a resumed training repeats it. The
    module uses `batch[noise_key]` for the noisy sample and for the target; validation batches get none.

    Args:
        key: Name of the clean samples in a batch, as the diffusion sees them.
        noise_key: Name under which the noise is put.
        labels_key: Name of the labels in a batch, or None to give none.
        across_ranks: Assign over the batches of all ranks together.
        seed: Number that fixes the noise.
        **options: Keyword arguments of `assign_noise`; across ranks, those that `assign_across_ranks` has.

    Raises:
        ValueError: An option has no meaning across ranks.
        TypeError: A batch is no mapping.
        KeyError: A batch has no samples, or no labels, of this name.

    Example:
        >>> trainer = L.Trainer(callbacks=[ImmiscibleCallback("latents", seed=0)], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        key: str = "x0",
        *,
        noise_key: str = "noise",
        labels_key: str | None = None,
        across_ranks: bool = False,
        seed: int = 0,
        **options: Unpack[Options],
    ) -> None:
        if across_ranks and (unknown := sorted(set(options) - {"cost", "strength", "solver", "precision"})):
            raise ValueError(f"across_ranks takes no {', '.join(unknown)}; leave it out, or assign inside each rank")
        self.key, self.noise_key, self.labels_key = key, noise_key, labels_key
        self.across_ranks, self.seed = across_ranks, seed
        self.options: dict[str, Any] = {**options}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Puts the noise into the batch."""
        if not isinstance(batch, MutableMapping):
            raise TypeError(f"the batch is a {type(batch).__name__}; this callback puts noise into a dict of tensors")
        for name, key in (("key", self.key), ("labels_key", self.labels_key)):
            if key is not None and key not in batch:
                raise KeyError(
                    f"the batch has no {key!r}, only {', '.join(map(str, batch))}; give its name as `{name}`"
                )
        # Of completed batches: a batch whose step failed is begun twice, and counted twice among those begun.
        x, step = batch[self.key], trainer.fit_loop.epoch_loop.batch_progress.total.completed
        labels = None if self.labels_key is None else batch[self.labels_key]
        if self.across_ranks:
            batch[self.noise_key] = assign_across_ranks(x, seed=self.seed, step=step, labels=labels, **self.options)
            return
        generator = torch.Generator(x.device).manual_seed(mixed_seed(self.seed, step, trainer.global_rank))
        options = {**self.options} if labels is None else {**self.options, "labels": labels}
        batch[self.noise_key] = assign_noise(x, draw_noise(x, generator), generator=generator, **options)
