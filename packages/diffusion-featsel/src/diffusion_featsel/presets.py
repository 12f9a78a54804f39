"""Sets of activations that were published, each with the protocol that its numbers belong to.

References:
    Meng et al. 2024, sections 4 and 5, and its published settings; Tang et al., "Emergent Correspondence from Image
    Diffusion", NeurIPS 2023 (DIFT), whose published code averages eight draws.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from diffcore.errors import UserError, printable
from diffusion_featsel.selection import Selection

Task = Literal["correspondence", "ade20k", "cityscapes", "horse21"]

PROMPTS: Mapping[Task, str] = {
    "correspondence": (
        "a highly realistic photo that may contain an aeroplane, a bicycle, a bird, a boat, a bottle, a bus, a car, "
        "a cat, a chair, a cow, a dog, a horse, a motorbike, a person, a plant within a pot, a sheep, a train, or a tv "
        "monitor."
    ),
    "ade20k": (
        "a highly realistic photo of the real world. It can be an indoor scene, or an outdoor scene, or a photo of "
        "nature. high quality."
    ),
    "cityscapes": (
        "An urban street scene with multiple lanes, various buildings, traffic lights, cars in the lanes, and "
        "pedestrians, highly realistic."
    ),
    "horse21": "a photo of a horse",
}
"""The one prompt that the paper gives to all images of a task."""

SIZES = {"sd15": 512, "sd21": 768, "sdxl": 1024, "pgv2": 1024}
"""Side in pixels of the squares that images are resized to, by model."""

_SD15_AMALGAM = {
    "up-level1-repeat1-vit-block0-cross-q": 1280,
    "up-level2-repeat1-vit-block0-cross-q": 640,
    "up-level2-upsampler-out": 640,
    "up-level3-repeat0-vit-block0-self-k": 320,
    "up-cross-map": 154,
}
_SDXL_PRACTICAL = {
    "up-level0-repeat0-vit-block7-out": 1280,
    "up-level0-repeat0-vit-block5-out": 1280,
    "up-level1-repeat0-vit-block0-cross-q": 640,
    "up-level1-repeat0-vit-block0-out": 640,
}
_PGV2_AMALGAM = {"up-level0-repeat0-vit-block3-out": 1280}

_SETS: dict[str, dict[str, dict[str, int]]] = {
    "sd15/practical": {
        "sd15": {
            "up-level1-repeat1-vit-block0-cross-q": 1280,
            "up-level1-repeat2-res-out": 1280,
            "up-level2-repeat1-vit-block0-cross-q": 640,
            "up-level3-repeat0-vit-block0-self-k": 320,
        }
    },
    "sdxl/practical": {"sdxl": _SDXL_PRACTICAL},
    "sd15/legacy": {
        "sd15": {
            "up-level0-upsampler-out": 1280,
            "up-level1-upsampler-out": 1280,
            "up-level2-upsampler-out": 640,
            "up-level3-repeat2-vit-out": 320,
        }
    },
    "sdxl/legacy": {
        "sdxl": {"up-level0-upsampler-out": 1280, "up-level1-upsampler-out": 640, "up-level2-repeat2-res-out": 320}
    },
    "sd15/amalgam": {"sd15": _SD15_AMALGAM},
    "pgv2/amalgam": {"pgv2": _PGV2_AMALGAM},
    "xl-t": {"sdxl": _SDXL_PRACTICAL, "sd15": _SD15_AMALGAM, "pgv2": _PGV2_AMALGAM},
    "xl-t/ade": {
        "sdxl": {**_SDXL_PRACTICAL, "up-level1-upsampler-out": 640},
        "pgv2": {
            "up-level0-repeat0-vit-block5-out": 1280,
            "up-level1-repeat0-vit-block0-cross-q": 640,
            "up-level1-upsampler-out": 640,
        },
    },
    "dift/sd21": {"sd21": {"up-level1-upsampler-out": 1280}},
}
PRESETS: tuple[str, ...] = tuple(_SETS)
"""Names of all presets."""

_SAME_NAMES = {"sd15": ("sd15", "sd21"), "sdxl": ("sdxl", "pgv2")}


@dataclass(frozen=True)
class Preset:
    """A published set of activations, of one model or of several.

    Attributes:
        name: Name of the preset.
        parts: Selection for each model: "sd15", "sd21", "sdxl" or "pgv2" (Playground v2).
        channels: Number of channels of each activation, for each model.
    """

    name: str
    parts: Mapping[str, Selection]
    channels: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def num_channels(self) -> int:
        """Number of channels of all activations together."""
        return sum(sum(channels.values()) for channels in self.channels.values())

    @property
    def selection(self) -> Selection:
        """The selection of a preset with one model.

        Raises:
            UserError: The preset has several models, whose features are concatenated.
        """
        if len(self.parts) > 1:
            models = ", ".join(self.parts)
            raise UserError(
                f"the preset {self.name} needs {len(self.parts)} models ({models}); extract `parts` of each"
            )
        return next(iter(self.parts.values()))


def preset(name: str, *, task: Task = "correspondence") -> Preset:
    """Returns a published set of activations with its timestep, prompt, image size and draws.

    Sizes and the resizing are in the selection's details: "size" in pixels, "fit", and "vae_sample" where latents are
    drawn from the autoencoder's posterior. Presets of DIFT have a prompt for each category, "a photo of a CATEGORY";
    its script for single images leaves the prompt empty, and so does the preset.

    Args:
        name: One of `PRESETS`, such as "sd15/practical".
        task: Task whose fixed prompt is taken; "xl-t/ade" is for ADE20K whatever is said here.

    Raises:
        UserError: There is no preset of this name.

    Example:
        >>> found = preset("sd15/practical")
        >>> found.num_channels, found.selection.t, found.selection.details["size"]
        (3520, 50.0, 512)
        >>> list(preset("xl-t").parts)
        ['sdxl', 'sd15', 'pgv2']
    """
    if name not in _SETS:
        raise UserError(f"there is no preset {printable(name)!r}; `name` may be {', '.join(PRESETS)}")
    parts = {model: _selection(name, model, names, task) for model, names in _SETS[name].items()}
    return Preset(name, parts, _SETS[name])


def presets_with(activation: str, family: str | None) -> list[str]:
    """Returns the names of the presets that an activation of an architecture is in.

    Args:
        activation: The paper's name of the activation.
        family: Architecture of the model, "sd15" or "sdxl"; None is in no preset.
    """
    models = _SAME_NAMES.get(family or "", ())
    return [name for name, parts in _SETS.items() if any(activation in parts.get(model, ()) for model in models)]


def _selection(name: str, model: str, names: Mapping[str, int], task: Task) -> Selection:
    details = {"preset": name, "model": model, "size": SIZES[model], "fit": "squash", "channels": sum(names.values())}
    if name.startswith("dift/"):
        return Selection(tuple(names), t=261.0, draws=8, details=details | {"vae_sample": True})
    return Selection(tuple(names), t=50.0, prompt=PROMPTS["ade20k" if name == "xl-t/ade" else task], details=details)
