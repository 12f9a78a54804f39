"""A network from an ONNX file as a module, run by onnxruntime on the CPU; unlike TorchScript it runs no code."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from diffcore.checkpoint.refusal import refusal
from diffcore.errors import MissingDependencyError, printable
from diffcore.metrics.preprocess import Preprocessing


class OnnxNetwork(nn.Module):
    """An ONNX network that takes preprocessed images, converted to the layout and type that its file expects.

    Files take either floats, normalised as the network was trained, or bytes from 0 to 255; channels come first or
    last; height and width are free or fixed. Bytes are made by undoing the normalisation and rounding.

    Args:
        path: The ONNX file to load.
        preprocessing: Preprocessing with the mean and deviation that the network was trained with.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        IncompatibleModelError: The file is no ONNX file, or does not turn one batch of images into rows.
    """

    def __init__(self, path: Path, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.preprocessing = preprocessing
        self.session = _session(path)
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        taken = inputs[0]
        kinds = {"tensor(float)": np.float32, "tensor(uint8)": np.uint8}
        if len(inputs) != 1 or len(taken.shape) != 4 or taken.type not in kinds or 3 not in (*taken.shape[1::2],):
            shown = ", ".join(f"{i.type} {i.shape}" for i in inputs)
            raise refusal(path, f"takes {printable(shown, 200)}; expected one batch of images of three channels")
        if len(outputs[0].shape) != 2 or outputs[0].type != "tensor(float)":
            raise refusal(path, f"returns {printable(outputs[0].shape)}; expected a row of floats per image")
        self.name, self.dtype = taken.name, kinds[taken.type]
        self.channels_last = taken.shape[1] != 3
        self.size = tuple(taken.shape[1:3] if self.channels_last else taken.shape[2:])
        if isinstance(taken.shape[0], int) and taken.shape[0] != 1:
            raise refusal(path, f"takes batches of {taken.shape[0]} images alone; export it for one, or for any number")
        self.one_by_one = taken.shape[0] == 1

    @torch.no_grad()
    def forward(self, x: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b d"]:
        """Returns one row of features per image."""
        size = tuple(a if isinstance(a, int) else b for a, b in zip(self.size, x.shape[2:], strict=True))
        if size != tuple(x.shape[2:]):
            x = functional.interpolate(x, size, mode="bilinear", antialias=True, align_corners=False)
        if self.dtype == np.uint8:
            std, mean = (x.new_tensor(v).view(3, 1, 1) for v in (self.preprocessing.std, self.preprocessing.mean))
            x = ((x * std + mean) * 255).round().clamp(0, 255)
        x = x.permute(0, 2, 3, 1) if self.channels_last else x
        rows = np.ascontiguousarray(x.cpu().numpy().astype(self.dtype))
        parts = np.split(rows, len(rows)) if self.one_by_one else [rows]
        return torch.from_numpy(np.concatenate([self.session.run(None, {self.name: p})[0] for p in parts])).to(x.device)


def _session(path: Path) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError("onnxruntime is not installed; pip install 'diffcore[onnx]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        # From bytes: the file whose digest is shown is the one that runs, and it can name no other.
        return onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a dozen of its own
        raise refusal(path, f"is no ONNX file that onnxruntime reads ({printable(error)})") from None
