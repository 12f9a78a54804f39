"""The extractor as a transformer of scikit-learn: arrays of images in, one row of numbers per image or place out."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_array, check_is_fitted

from diffcore.errors import UserError
from diffcore.models import DiffusionModel
from diffusion_featsel.extractor import FeatureExtractor
from diffusion_featsel.selection import Selection

Pooling = Literal["mean", "gem", "none"]
"""Rule by which the places of an image become one row."""

_GEM = 3.0  # exponent of the generalised mean


class DiffusionFeatures(TransformerMixin, BaseEstimator):
    """Transforms images into features of a diffusion model, for pipelines of scikit-learn.

    Images come as arrays (n, height, width, 3) or (n, 3, height, width), of 8 bits or of floats in [0, 1]. `fit`
    measures the scale of each activation on the training images; nothing else is learned.

    Args:
        model: The diffusion model to look into.
        features: A selection, the name of a preset, or names of activations.
        pooling: "mean" over places, "gem" for their generalised mean of exponent 3, which weighs large values more, or
            "none" for one row per place.
        size: Side of the maps that "none" resizes all activations to; by default that of the finest.
        balance: Whether each activation is divided by its root mean square over the training images.
        t: Timestep; by default that of the selection, or the paper's.
        prompt: Prompt for all images; by default that of the selection.
        seed: Seed of the noise.
        draws: Number of noise draws that are averaged; by default that of the selection.
        input_size: Side of the network's input in pixels; by default what the model was trained for.
        batch_size: Number of images that are computed together.

    Attributes:
        extractor_: The extractor, after fitting.
        n_features_out_: Number of columns of the result.

    Example:
        >>> from diffcore.models import from_pipeline
        >>> from diffcore.testing import tiny
        >>> model = from_pipeline(tiny.pipeline("sd15"))
        >>> transformer = DiffusionFeatures(model, ["mid-vit-out", "up-level0-upsampler-out"])
        >>> images = np.random.default_rng(0).integers(0, 256, (4, 20, 20, 3), dtype=np.uint8)
        >>> transformer.fit_transform(images).shape
        (4, 128)
        >>> transformer.set_params(pooling="none").fit_transform(images).shape
        (256, 128)
    """

    def __init__(
        self,
        model: DiffusionModel,
        features: Selection | str | Sequence[str] = "sd15/practical",
        *,
        pooling: Pooling = "mean",
        size: int | None = None,
        balance: Literal["rms", "none"] = "rms",
        t: float | int | str | None = None,
        prompt: str | None = None,
        seed: int = 0,
        draws: int | None = None,
        input_size: int | None = None,
        batch_size: int = 16,
    ) -> None:
        self.model = model
        self.features = features
        self.pooling: Pooling = pooling
        self.size = size
        self.balance: Literal["rms", "none"] = balance
        self.t = t
        self.prompt = prompt
        self.seed = seed
        self.draws = draws
        self.input_size = input_size
        self.batch_size = batch_size

    def fit(self, X: Any, y: Any = None) -> "DiffusionFeatures":
        """Measures the scale of each activation on images; labels are ignored.

        Args:
            X: Images as an array of four dimensions.
            y: Ignored; present for the convention.

        Raises:
            ValueError: The array does not hold images.
        """
        images = self._images(X, reset=True)
        if self.pooling not in ("mean", "gem", "none"):
            raise UserError(f"`pooling` is {self.pooling!r}; it may be 'mean', 'gem' or 'none'")
        self.extractor_ = FeatureExtractor(
            self.model,
            self.features,
            t=self.t,
            prompt=self.prompt,
            seed=self.seed,
            draws=self.draws,
            size=self.input_size,
            balance=self.balance,
        )
        if self.balance == "rms":
            self.extractor_.calibrate(_batches(images, self.batch_size))
        self.n_features_out_ = sum(self.extractor_.channels(name) for name in self.extractor_.names)
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Returns the features of images in float32: one row per image, or per place, row by row of each image.

        Args:
            X: Images as an array of four dimensions.

        Raises:
            NotFittedError: `fit` was not called.
            ValueError: The array does not hold images of as many channels.
        """
        check_is_fitted(self)
        images = self._images(X, reset=False)
        rows = [self._rows(batch) for batch in _batches(images, self.batch_size)]
        return torch.cat(rows).cpu().numpy()

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Returns a name for each column: that of the activation, and the number of the channel.

        Args:
            input_features: Ignored; present for the convention.
        """
        check_is_fitted(self)
        extractor = self.extractor_
        names = [f"{name}:{number}" for name in extractor.names for number in range(extractor.channels(name))]
        return np.asarray(names, dtype=object)

    def __sklearn_clone__(self) -> "DiffusionFeatures":
        """Returns an unfitted copy around the same networks, which a copy of all settings would double."""
        return type(self)(**self.get_params(deep=False))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.three_d_array = False
        tags.transformer_tags.preserves_dtype = ["float32"]
        tags.no_validation = False
        tags.requires_fit = True
        return tags

    def _rows(self, images: torch.Tensor) -> torch.Tensor:
        extractor = self.extractor_
        with torch.no_grad():
            if self.pooling == "none":
                return extractor.maps(images, self.size).movedim(1, -1).flatten(0, 2)
            found = extractor(images)
            pooled = {name: _pooled(maps.float(), self.pooling) for name, maps in found.items()}
            return extractor.concatenated(pooled, (1, 1)).flatten(1)

    def _images(self, X: Any, *, reset: bool) -> torch.Tensor:
        """Returns an array of images as a tensor (n, 3, height, width) in [0, 1]."""
        kinds: Any = [np.uint8, np.float32, np.float64]
        array = check_array(X, ensure_2d=False, allow_nd=True, dtype=kinds)
        if array.ndim != 4:
            raise ValueError(
                f"images have 4 dimensions, and this array has {array.ndim}. Reshape your data: (n, h, w, 3)"
            )
        channels_last = array.shape[3] == 3
        if not channels_last and array.shape[1] != 3:
            raise ValueError(f"images have 3 channels, first or last; this array has the shape {array.shape}")
        if reset:
            self.n_features_in_ = int(np.prod(array.shape[1:]))
            self._channels_last = channels_last
        if array.dtype != np.uint8 and not (array.min() >= 0 and array.max() <= 1):
            raise ValueError(f"images of floats are in [0, 1]; these run from {array.min():g} to {array.max():g}")
        images = torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2) if channels_last else array))
        return images.float() / 255 if array.dtype == np.uint8 else images.float()


def _pooled(maps: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    if pooling == "mean":
        return maps.mean((2, 3), keepdim=True)
    powers = maps.abs().pow(_GEM) * maps.sign()
    mean = powers.mean((2, 3), keepdim=True)
    return mean.abs().pow(1 / _GEM) * mean.sign()


def _batches(images: torch.Tensor, size: int) -> list[torch.Tensor]:
    return list(images.split(size))
