#!/usr/bin/env bash
# lightning 2.6.6 with torch 2.13.0.
#
# A module that steps two optimizers by hand, as adversarial training does, moves `trainer.global_step` by two per batch,
# and `max_steps` and the step in a checkpoint's name count the same: training that was planned for 10 batches ends after
# 5. The documentation of `global_step` says "the number of optimizer steps taken"; that `max_steps=10` means 10 batches
# with one optimizer and 5 with two is left to the reader. Beside it, `gradient_clip_val` is refused in manual
# optimization; what clips is `self.clip_gradients(optimizer, ...)`, which must be called for each optimizer.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --quiet --disable-pip-version-check torch==2.13.0 lightning==2.6.6 numpy
cd "$folder"
"$folder/env/bin/python" - 2>/dev/null <<'PY'
import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader

print("lightning", lightning.__version__, "torch", torch.__version__)


class Game(lightning.LightningModule):
    def __init__(self, players):
        super().__init__()
        self.automatic_optimization = False
        self.players = nn.ModuleList(nn.Linear(1, 1) for _ in range(players))
        self.batches = 0

    def configure_optimizers(self):
        return [torch.optim.SGD(player.parameters(), lr=0.1) for player in self.players]

    def training_step(self, batch, index):
        self.batches += 1
        optimizers = self.optimizers()
        for player, optimizer in zip(self.players, optimizers if isinstance(optimizers, list) else [optimizers]):
            optimizer.zero_grad()
            self.manual_backward(player(batch).square().mean())
            optimizer.step()


def train(players, **options):
    trainer = lightning.Trainer(
        max_steps=10, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, **options
    )
    module = Game(players)
    trainer.fit(module, DataLoader(torch.ones(100, 1), batch_size=1))
    return module.batches, trainer.global_step


for players in (1, 2):
    batches, step = train(players)
    print(f"{players} optimizer(s), max_steps=10: {batches} batches, global_step {step}")
    assert (batches, step) == (10 // players, 10), "each optimizer's step used to count"
try:
    train(2, gradient_clip_val=1.0)
except lightning.pytorch.utilities.exceptions.MisconfigurationException as error:
    print("gradient_clip_val=1.0:", str(error).splitlines()[0])
else:
    raise AssertionError("gradient_clip_val used to be refused in manual optimization")
PY
