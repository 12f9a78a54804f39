"""Encoded images on disk, so that another timestep, prompt, draw or selection starts from them.

The autoencoder costs more than the network at 512 pixels. A file holds one image: mean and, where draws need it,
standard deviation of its posterior, in float32. Its folder is named by everything that both depend on.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from diffcore.digests import add_tensors, digest_of_values
from diffcore.errors import UserError, printable
from diffcore.io import files
from diffcore.models import DiffusionModel
from diffusion_featsel.protocol import Protocol


class LatentFolder:
    """Latents of images, kept by the autoencoder's fingerprint, the protocol and the key of each image.

    Args:
        folder: Folder that keeps them; made when the first is written.
        model: The model whose autoencoder encodes.
        protocol: Settings by which images are prepared.

    Example:
        >>> from tempfile import mkdtemp
        >>> from diffcore.testing import tiny
        >>> kept = LatentFolder(Path(mkdtemp()), tiny.model("sd15"), Protocol())
        >>> kept.put([7], (16, 16), torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8))
        >>> tuple(kept.get([7], (16, 16))[0].shape), kept.get([7, 8], (16, 16))
        ((1, 4, 8, 8), None)
    """

    def __init__(self, folder: Path | str, model: DiffusionModel, protocol: Protocol) -> None:
        kind = "published" if protocol.published else protocol.mode
        self.draws = protocol.sample
        self._root = Path(folder) / f"{codec_fingerprint(model)[:16]}-{kind}-{'posterior' if self.draws else 'mode'}"

    def get(self, keys: Sequence[int], size: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        """Returns mean and standard deviation of some images; None where one of them is missing or damaged.

        An image's last bits depend on what it was encoded with, so that batches are taken whole or not at all.

        Args:
            keys: Keys of the images.
            size: Height and width of the network's input in pixels.
        """
        found = [self._read(self._path(key, size)) for key in keys]
        if not all(found):
            return None
        whole = [tensors for tensors in found if tensors]
        mean = torch.stack([tensors["mean"] for tensors in whole])
        std = torch.stack([tensors["std"] for tensors in whole]) if self.draws else torch.zeros_like(mean)
        return mean, std

    def put(self, keys: Sequence[int], size: tuple[int, int], mean: Tensor, std: Tensor) -> None:
        """Writes the latents of some images.

        Args:
            keys: Keys of the images.
            size: Height and width of the network's input in pixels.
            mean: Mean of each image's posterior.
            std: Standard deviation of each image's posterior; kept where the protocol draws from it.
        """
        rows = {"mean": mean.float().cpu()} | ({"std": std.float().cpu()} if self.draws else {})
        for row, key in enumerate(keys):
            data = save({name: tensor[row].contiguous() for name, tensor in rows.items()})
            files.write_whole(self._path(key, size), data)

    def _path(self, key: int, size: tuple[int, int]) -> Path:
        return self._root / f"{size[0]}x{size[1]}" / f"{key:016x}.safetensors"

    def _read(self, path: Path) -> dict[str, Tensor] | None:
        if not path.is_file():
            return None
        try:
            tensors = load(path.read_bytes())
        except Exception:  # a damaged file is as good as none: it is made again
            return None
        wanted = {"mean", "std"} if self.draws else {"mean"}
        return tensors if tensors.keys() == wanted else None


def codec_fingerprint(model: DiffusionModel) -> str:
    """Returns a digest of the autoencoder: class, configuration, precision and all weights.

    Args:
        model: The diffusion model with its autoencoder.

    Raises:
        UserError: The model has no autoencoder, whose work could be kept.
    """
    vae = getattr(model.codec, "vae", None)
    if not isinstance(vae, nn.Module):
        raise UserError(f"{printable(model.name)} has no autoencoder, so that there are no latents to keep")
    config = {key: value for key, value in dict(getattr(vae, "config", {})).items() if not key.startswith("_")}
    digest = hashlib.sha256(digest_of_values([type(vae).__name__, config]).encode())
    add_tensors(digest, vae.state_dict())
    return digest.hexdigest()
