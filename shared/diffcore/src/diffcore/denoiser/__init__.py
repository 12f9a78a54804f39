"""Denoisers, their noise schedules and parameterisations, and the sampler."""

from diffcore.denoiser.denoiser import (
    BackboneCall,
    Condition,
    Denoiser,
    GaussianMixtureDenoiser,
    GuidedDenoiser,
    NetworkDenoiser,
)
from diffcore.denoiser.prediction import Prediction, PredictionType
from diffcore.denoiser.sample import Solver, sample
from diffcore.denoiser.schedule import (
    DiscreteSchedule,
    EDMSchedule,
    FlowSchedule,
    NoiseSchedule,
    bridge,
)
from diffcore.denoiser.scheduler import schedule_from

__all__ = [
    "BackboneCall",
    "Condition",
    "Denoiser",
    "DiscreteSchedule",
    "EDMSchedule",
    "FlowSchedule",
    "GaussianMixtureDenoiser",
    "GuidedDenoiser",
    "NetworkDenoiser",
    "NoiseSchedule",
    "Prediction",
    "PredictionType",
    "Solver",
    "bridge",
    "sample",
    "schedule_from",
]
