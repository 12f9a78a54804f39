"""A network that reads the five style numbers of a digit."""

from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from diffcore.io.files import make_folder
from diffcore.zoo.digits.data import DIGITS, SIZE, STYLES

_WIDTH = 256


class StyleOracle(nn.Module):
    """A perceptron of two hidden layers on the pixels and the class."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(SIZE**2 + len(DIGITS), _WIDTH),
            nn.SiLU(),
            nn.Linear(_WIDTH, _WIDTH),
            nn.SiLU(),
            nn.Linear(_WIDTH, len(STYLES)),
        )

    def forward(self, x0: Float[Tensor, "b 1 8 8"], labels: Int[Tensor, " b"]) -> Float[Tensor, "b 5"]:
        """Returns the style numbers of digits in model space."""
        return self.layers(torch.cat([x0.flatten(1), F.one_hot(labels, len(DIGITS)).to(x0.dtype)], dim=1))

    def save(self, folder: Path) -> None:
        """Writes the weights in float16."""
        make_folder(folder)
        save_file({name: value.half() for name, value in self.state_dict().items()}, folder / "model.safetensors")


def load_style_oracle(folder: Path) -> StyleOracle:
    """Loads a network that `StyleOracle.save` wrote, in float32 and evaluation mode."""
    oracle = StyleOracle()
    oracle.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
    return oracle.eval().requires_grad_(False)


def explained_variance(predicted: Float[Tensor, "n 5"], true: Float[Tensor, "n 5"]) -> dict[str, float]:
    """Returns the coefficient of determination R² of each style number."""
    residual = (predicted - true).square().mean(0)
    return dict(zip(STYLES, (1 - residual / true.var(0, correction=0)).tolist(), strict=True))
