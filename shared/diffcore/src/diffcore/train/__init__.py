"""Training denoisers and other networks on Lightning's Trainer.

Everything that a training step draws is a function of (seed, iteration, row), so a run that was killed and resumed
equals one that was not, and two processes equal one at the same global batch.
"""

from diffcore.train.callbacks import ConsoleSummary, SampleGrid, Snapshots, snapshot_key
from diffcore.train.ema import EMA
from diffcore.train.fit import fit
from diffcore.train.iteration import IterationModule, iterations_done, scheduled
from diffcore.train.logger import JSONLLogger
from diffcore.train.module import DenoisingModule, PairNoise
from diffcore.train.order import StepData, StepSampler
from diffcore.train.supervised import fit_supervised, rise_and_fall
from diffcore.train.timesteps import log_normal_sigmas, logit_normal_times, uniform_timesteps

__all__ = [
    "EMA",
    "ConsoleSummary",
    "DenoisingModule",
    "IterationModule",
    "JSONLLogger",
    "PairNoise",
    "SampleGrid",
    "Snapshots",
    "StepData",
    "StepSampler",
    "fit",
    "fit_supervised",
    "iterations_done",
    "log_normal_sigmas",
    "logit_normal_times",
    "rise_and_fall",
    "scheduled",
    "snapshot_key",
    "uniform_timesteps",
]
