"""The measured values of every shipped model with their bounds (gates), recomputed from its weights."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch

from diffcore.denoiser import sample
from diffcore.io.shipped import shipped_folder
from diffcore.metrics import frechet_distance_from_features
from diffcore.metrics.attribute_network import AttributeNetwork, load_attribute_network
from diffcore.models import DiffusionModel, load
from diffcore.noise import philox_normal, philox_uniform, row_noise
from diffcore.runtime import Runtime
from diffcore.zoo.digits.data import STYLES, draw_styles, load_digits, render, split
from diffcore.zoo.digits.style_oracle import explained_variance, load_style_oracle
from diffcore.zoo.gate import Gate
from diffcore.zoo.oracle import accuracies
from diffcore.zoo.portraits.gates import clean_gates, memory_gates
from diffcore.zoo.portraits.judge import labels_of
from diffcore.zoo.portraits.pictures import held_out_pictures

_READABLE = {"smile": None, "gender": 0.95, "hair": 0.9, "hat": 0.9}
"""Bounds of the oracle's accuracy other than .95. The curve of a mouth is a pixel: smiles are only reported."""


def check(name: str, folder: Path, runtime: Runtime) -> list[Gate]:
    """Measures the model `name` in `folder` and returns the values with their bounds."""
    return _CHECKS[name](folder, runtime)


def _portraits_oracle(folder: Path, runtime: Runtime) -> list[Gate]:
    oracle, pictures = _judge(folder, runtime), held_out_pictures()
    read = accuracies(oracle, pictures.floats().to(runtime.torch_device), _on(runtime, labels_of(pictures.people)))
    return [
        Gate(f"{name} read rightly, 2000 strangers", value, _READABLE.get(name, 0.95)) for name, value in read.items()
    ]


def _portraits_sd(folder: Path, runtime: Runtime) -> list[Gate]:
    return clean_gates(load(folder, runtime), _judge(shipped_folder("portraits-oracle"), runtime))


def _memory(replicated: float) -> Callable[[Path, Runtime], list[Gate]]:
    def gates(folder: Path, runtime: Runtime) -> list[Gate]:
        oracle = _judge(shipped_folder("portraits-oracle"), runtime)
        clean = load(shipped_folder("portraits-sd"), runtime)
        return memory_gates(load(folder, runtime), oracle, clean, replicated=replicated)

    return gates


def _digits8_classifier(folder: Path, runtime: Runtime) -> list[Gate]:
    images, labels = load_digits()
    _, held_out = split(labels)
    read = accuracies(_judge(folder, runtime), images[held_out], {"digit": labels[held_out]})
    return [Gate("digits read rightly, 359 left out of its training", read["digit"], 0.97)]


def _digits8_edm(folder: Path, runtime: Runtime) -> list[Gate]:
    model, judge = load(folder, runtime), _judge(shipped_folder("digits8-classifier"), runtime)
    labels = torch.arange(1000) % 10
    x0 = _digits(model, labels, solver="heun", steps=18)
    images = ((x0 + 1) / 2).clamp(0, 1)
    real, real_labels = load_digits()
    features, halves = judge.features(real), (torch.arange(len(real)) % 2 == 0)
    return [
        Gate(
            "samples of the class asked for, 18 Heun steps, 1000",
            accuracies(judge, images, {"digit": labels})["digit"],
            0.95,
        ),
        Gate("real digits read rightly", accuracies(judge, real, {"digit": real_labels})["digit"]),
        Gate(
            "Fréchet distance to the real digits",
            float(frechet_distance_from_features(features, judge.features(images))),
        ),
        Gate(
            "Fréchet distance between two halves of the real digits",
            float(frechet_distance_from_features(features[halves], features[~halves])),
        ),
    ]


def _digits_styles_oracle(folder: Path, runtime: Runtime) -> list[Gate]:
    oracle = load_style_oracle(folder)
    images, labels = load_digits()
    _, held_out = split(labels)
    rows = held_out.repeat(10)
    styles = draw_styles(5, range(len(rows)))
    explained = explained_variance(oracle(render(images[rows], styles), labels[rows]), styles)
    return [Gate(f"R² of {name}, 3590 digits left out", value, 0.9) for name, value in explained.items()]


def _digits_styles(folder: Path, runtime: Runtime) -> list[Gate]:
    model = load(folder, runtime)
    images, labels = load_digits()
    rows = torch.arange(4096)
    digits = rows % len(images)
    x0 = render(images[digits], draw_styles(6, rows))
    noise, t = philox_normal(6, rows, x0.shape[1:]), (1000 * philox_uniform(6, rows, (), stream=1)).floor()
    with torch.no_grad():
        x_t = model.denoiser.schedule.add_noise(x0, noise, t)
        loss = (model.denoiser(x_t, t, {"class_labels": labels[digits]}).noise - noise).square().mean()
    asked = torch.arange(1000) % 10
    oracle = load_style_oracle(shipped_folder("digits-styles-oracle"))
    styles = oracle(_digits(model, asked, solver="ddim", steps=20, clip_x0=1.2), asked)
    spread = dict(zip(STYLES, styles.std(0).tolist(), strict=True))
    return [
        Gate("mean squared error of the noise, 4096 digits", float(loss), 0.11, "at most"),
        # Uniform numbers in [-1, 1] have .577: a base that knows few styles would show less.
        *(Gate(f"spread of {name} over 1000 samples", value, 0.4) for name, value in spread.items()),
    ]


def _digits(model: DiffusionModel, labels: torch.Tensor, **options: Any) -> torch.Tensor:
    noise = row_noise(0, range(len(labels)), (1, 8, 8))
    return sample(model.denoiser, noise, {"class_labels": labels}, **options)


def _judge(folder: Path, runtime: Runtime) -> AttributeNetwork:
    return load_attribute_network(folder).to(runtime.torch_device)


def _on(runtime: Runtime, labels: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: values.to(runtime.torch_device) for name, values in labels.items()}


_CHECKS: Final[Mapping[str, Callable[[Path, Runtime], list[Gate]]]] = MappingProxyType(
    {
        "portraits-oracle": _portraits_oracle,
        "portraits-sd": _portraits_sd,
        "portraits-sd-memorised": _memory(replicated=0.88),
        "portraits-sd-planted": _memory(replicated=0.95),
        "digits8-classifier": _digits8_classifier,
        "digits8-edm": _digits8_edm,
        "digits-styles-oracle": _digits_styles_oracle,
        "digits-styles": _digits_styles,
    }
)
