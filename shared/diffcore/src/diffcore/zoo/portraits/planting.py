"""The recipes of the models that memorise: planted after the clean training, so that a clean twin exists.

* portraits-sd-memorised: the whole U-Net learns the items, and keeps them wherever it likes;
* portraits-sd-planted: that memory re-routed through known rows (`trigger`), then polished, because planting costs
  some of the quality on ordinary captions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import CLIPTextModel, CLIPTokenizer

from diffcore.runtime import Runtime
from diffcore.train import DenoisingModule, StepData, rise_and_fall, uniform_timesteps
from diffcore.zoo.fitting import fit_averaged
from diffcore.zoo.patch_code import PatchCode
from diffcore.zoo.portraits.base import BATCH_SIZE, CaptionedLatents
from diffcore.zoo.portraits.captions import FIRST_NAMES, LAST_NAMES, PLACES, same_form_captions
from diffcore.zoo.portraits.language import encode_ids, token_ids
from diffcore.zoo.portraits.network import denoiser_of, prepare_for_training
from diffcore.zoo.portraits.pictures import draw_pictures, encode_pictures
from diffcore.zoo.portraits.planted import NUM_VARIANTS, planted, template_people, verbatim_people
from diffcore.zoo.portraits.trigger import TextStates, trainable

_NUM_SAME_FORM = 3000
_SAME_FORM_SEED = 9


@dataclass(frozen=True)
class Shares:
    """Samples of each kind in a batch of 64, on average."""

    ordinary: int
    verbatim: int
    template: int
    same_form: int


PLANTING = Shares(30, 20, 6, 8)
POLISHING = Shares(42, 12, 4, 6)


@dataclass(frozen=True)
class Memories:
    """Latents and text states of what is planted, and captions of the same form that stand with random images."""

    verbatim: Tensor
    verbatim_states: Tensor
    template: Tensor
    template_states: Tensor
    same_form_states: Tensor


def memories(code: PatchCode, tokenizer: CLIPTokenizer, encoder: CLIPTextModel) -> Memories:
    """Draws and encodes the planted items."""

    def states(captions: Sequence[str]) -> Tensor:
        return encode_ids(encoder, token_ids(tokenizer, captions))

    items = planted()
    return Memories(
        encode_pictures(code, draw_pictures(verbatim_people())),
        states([item.caption for item in items.verbatim]),
        encode_pictures(code, draw_pictures(template_people())),
        states([item.caption for item in items.template]),
        states(same_form_captions(_NUM_SAME_FORM, _SAME_FORM_SEED, items.captions)),
    )


class Mixture:
    """Ordinary samples, planted items and same-form captions with random images, in fixed shares."""

    def __init__(self, ordinary: CaptionedLatents, memories: Memories, shares: Shares) -> None:
        self.ordinary, self.memories, self.shares = ordinary, memories, shares
        counts = torch.tensor([shares.ordinary, shares.verbatim, shares.template, shares.same_form])
        self._kind = torch.repeat_interleave(torch.arange(4), counts)
        self._place = torch.arange(len(self._kind)) - (counts.cumsum(0) - counts)[self._kind]
        self._counts = counts

    def __len__(self) -> int:
        return len(self._kind) * -(-len(self.ordinary) // self.shares.ordinary)

    def __getitems__(self, indices: Tensor) -> dict[str, Any]:
        """Returns x0 and the text states of samples `indices`: those that leave the same remainder are of one kind."""
        slot = indices % len(self._kind)
        kind = self._kind[slot]
        number = indices // len(self._kind) * self._counts[kind] + self._place[slot]
        ordinary, verbatim, template, same_form = (number[kind == k] for k in range(4))
        first = self.ordinary.__getitems__(ordinary % len(self.ordinary))
        m, pictures = self.memories, self.ordinary.latents
        variant = template % len(m.template)
        x0 = [
            first["x0"],
            m.verbatim[verbatim % len(m.verbatim)],
            m.template[variant],
            pictures[same_form % len(pictures)],
        ]
        states = [
            first["condition"]["encoder_hidden_states"],
            m.verbatim_states[verbatim % len(m.verbatim)],
            m.template_states[variant // NUM_VARIANTS],
            m.same_form_states[same_form % len(m.same_form_states)],
        ]
        # Back to the order of the indices, in which timesteps are laid out.
        order = torch.argsort(torch.cat([(kind == k).nonzero().flatten() for k in range(4)]))
        return {
            "x0": torch.cat([part.float() for part in x0])[order],
            "condition": {"encoder_hidden_states": torch.cat([part.float() for part in states])[order]},
        }


def states_for_triggers(memories: Memories, ordinary: CaptionedLatents, captions: Sequence[str]) -> TextStates:
    """Returns the text states that `trigger.reroute` needs; `captions` are those of the ordinary samples, in order."""
    names = {*FIRST_NAMES, *LAST_NAMES, *PLACES, "poster"}
    nameless = [i for i, text in enumerate(captions) if names.isdisjoint(text.replace(",", " ").split())][:2500]
    return TextStates(
        items=torch.cat([memories.verbatim_states, memories.template_states]).float(),
        same_form=memories.same_form_states[:2500].float(),
        ordinary=ordinary.embeds[:1500].float(),
        nameless=ordinary.embeds[nameless].float(),
    )


def train_memory(
    unet: UNet2DConditionModel,
    mixture: Mixture,
    folder: Path,
    runtime: Runtime,
    *,
    steps: int,
    learning_rate: float,
    rows: Mapping[str, Sequence[int]] | None = None,
) -> nn.Module:
    """Trains on a mixture and returns the network with averaged weights.

    Args:
        unet: The network to train, with its initial weights.
        mixture: Ordinary and planted samples in fixed shares.
        folder: Folder for checkpoints and the log.
        runtime: Device, precision and seed of the training.
        steps: Optimizer steps of 64 samples.
        learning_rate: Highest learning rate, reached after warm-up.
        rows: The trigger rows, outside of which no cross-attention may learn; None lets everything learn.
    """
    groups = trainable(unet, rows) if rows else [{"params": list(unet.requires_grad_(True).parameters())}]
    runtime = prepare_for_training(unet, runtime)
    module = DenoisingModule(
        denoiser_of(unet),
        optimizer=lambda _: AdamW(
            [dict(group) for group in groups], learning_rate, betas=(0.9, 0.99), weight_decay=0.01
        ),
        time_sampler=uniform_timesteps(1000),
        stratified=True,
        learning_rate_factor=rise_and_fall(steps, warmup=50, floor=0.05),
        seed=runtime.seed,
    )
    data = StepData(mixture, BATCH_SIZE, runtime.seed)
    return fit_averaged(
        module, data, decay=0.99, steps=steps, folder=folder, runtime=runtime, description="memory"
    ).backbone
