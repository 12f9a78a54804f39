"""Feature extractors from local files: networks that turn images into the rows that metrics compare.

A metric of features has no meaning without the network they come from, so every extractor carries its name and the
sha256 of its files. Features are float32 whatever precision the models under test run in: agreement with the field's
reference tools is worth more than the time.
"""

import hashlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffcore.checkpoint.configcheck import refuse_code
from diffcore.checkpoint.refusal import about, refusal
from diffcore.checkpoint.walk import walk
from diffcore.checkpoint.weightfiles import find_weights
from diffcore.errors import IncompatibleModelError, MissingDependencyError, ModelNotFoundError, UserError, printable
from diffcore.io import files
from diffcore.io.shipped import shipped_folder
from diffcore.io.strictjson import read_untrusted
from diffcore.metrics.attribute_network import load_attribute_network
from diffcore.metrics.onnx_network import OnnxNetwork
from diffcore.metrics.preprocess import INCEPTION, SSCD, Preprocessing, preprocessing_from
from diffcore.metrics.random_network import PREPROCESSING, RandomNetwork
from diffcore.runtime import Runtime

_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
DEFAULT_FEATURES = "random:0"
_KINDS = "inception:FILE, clip:FOLDER, dino:FOLDER, sscd:FILE, random:SEED or zoo:portraits-oracle"
# model_type of config.json -> class, and settings that drop parts whose weights such folders lack
_CLIP: dict[str, tuple[str, dict[str, Any]]] = {"clip": ("CLIPModel", {})}
_DINO: dict[str, tuple[str, dict[str, Any]]] = {
    "dinov2": ("Dinov2Model", {}),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", {}),
    "dinov3_vit": ("DINOv3ViTModel", {}),
    "vit": ("ViTModel", {"add_pooling_layer": False}),
}


class FeatureExtractor(nn.Module):
    """A frozen network with its preprocessing.

    Attributes:
        name: The name it was asked for by, as `feature_extractor` takes it.
        sha256: Digest of the file, or of the names and digests of the files of its folder.
        preprocessing: Turns images into the network's input.
    """

    def __init__(
        self,
        name: str,
        sha256: str,
        preprocessing: Preprocessing,
        network: nn.Module,
        read: Callable[[nn.Module, Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.name, self.sha256, self.preprocessing = name, sha256, preprocessing
        self.network = network.eval()
        for parameter in self.network.parameters():  # TorchScript knows no requires_grad_ of the whole
            parameter.requires_grad_(False)
        self._read = read

    def forward(self, images: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b d"]:
        """Returns one row of features per image.

        Args:
            images: Values in [0, 1], on the extractor's device.
        """
        return self.embed(self.preprocessing(images.float()))

    @torch.no_grad()
    def embed(self, inputs: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b d"]:
        """Returns one row of features per image that is preprocessed already."""
        return self._read(self.network, inputs).flatten(1).float()


def feature_extractor(name: str, runtime: Runtime, *, allow_pickle: bool = False) -> FeatureExtractor:
    """Loads a feature extractor from local files, without any download.

    Args:
        name: `inception:FILE`, the TorchScript file of StyleGAN's and clean-fid's authors; `clip:FOLDER` or
            `dino:FOLDER`, a folder of transformers; `sscd:FILE`, a TorchScript file of SSCD's authors or an ONNX file
            that ends in .onnx; `random:SEED`, fixed random weights, which need no file; `zoo:portraits-oracle`, a judge
            that comes with diffcore.
        runtime: The device to compute on.
        allow_pickle: Whether TorchScript files, which are code, may be run.

    Raises:
        ModelNotFoundError: There is no such file or folder.
        IncompatibleModelError: It is unsafe, broken, or of another kind.
        UserError: The name is of no known kind.
    """
    kind, _, place = name.partition(":")
    if kind == "zoo":
        return _judge(name, runtime)
    if kind == "random" and place.isascii() and place.isdigit() and len(place) < 10:
        random = RandomNetwork(int(place)).to(runtime.torch_device)
        return FeatureExtractor(name, random.sha256(), PREPROCESSING, random, _output)
    if kind not in ("inception", "clip", "dino", "sscd") or not place:
        raise UserError(f"{printable(name)} is no feature extractor; use {_KINDS}")
    path = Path(place)
    if not path.exists():
        raise ModelNotFoundError(f"there is no {printable(path, 300)} for {kind} features; point to a local copy")
    if kind == "sscd" and path.suffix.lower() == ".onnx":
        return FeatureExtractor(name, files.sha256(path), SSCD, OnnxNetwork(path, SSCD), _output)
    if kind in ("inception", "sscd"):
        network = _torchscript(path, allow_pickle).to(runtime.torch_device)
        preprocessing, read = (INCEPTION, _inception_features) if kind == "inception" else (SSCD, _output)
        return FeatureExtractor(name, files.sha256(path), preprocessing, network, read)
    network, preprocessing, digest = _folder(path, _CLIP if kind == "clip" else _DINO)
    read = _clip_features if kind == "clip" else _class_token
    return FeatureExtractor(name, digest, preprocessing, network.to(runtime.torch_device), read)


def _judge(name: str, runtime: Runtime) -> FeatureExtractor:
    """Returns a classifier shipped with diffcore, whose features describe attributes of the shipped data sets only."""
    folder = shipped_folder(name)
    if not (folder / "model.safetensors").is_file() or not (folder / "config.json").is_file():
        raise UserError(f"{printable(name)} makes no features; use zoo:portraits-oracle or zoo:digits8-classifier")
    network = load_attribute_network(folder).to(runtime.torch_device)
    size = (network.config.size, network.config.size)
    preprocessing = Preprocessing(size, None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    read = _output if network.config.channels == 3 else _from_grey
    return FeatureExtractor(name, files.sha256(folder / "model.safetensors"), preprocessing, network, read)


def _torchscript(path: Path, allow_pickle: bool) -> nn.Module:
    if not path.is_file():
        raise refusal(path, "is a folder; point to the TorchScript file in it")
    if not allow_pickle:
        raise IncompatibleModelError(
            f"{printable(path, 300)} is TorchScript, which is code; pass `allow_pickle=True` if you trust its author"
        )
    try:
        return torch.jit.load(path, map_location="cpu").float()
    except (RuntimeError, ValueError) as error:
        raise refusal(path, f"is no TorchScript file that this torch reads ({printable(error)})") from None


def _folder(folder: Path, known: Mapping[str, tuple[str, dict[str, Any]]]) -> tuple[nn.Module, Preprocessing, str]:
    """Returns network, preprocessing and digest of a folder whose every file was checked before a library reads it."""
    if not folder.is_dir():
        raise refusal(folder, "is a file; point to the folder with its config.json")
    names = walk(folder)
    if "config.json" not in names:
        raise refusal(folder, "has no config.json")
    if "adapter_config.json" in names:
        raise refusal(folder, "is an adapter, or holds one; point to a whole model")
    config = read_untrusted(folder / "config.json")
    with about(folder / "config.json"):
        refuse_code(config)
    model_type = str(config.get("model_type"))
    if model_type not in known:
        raise refusal(folder, f"is of model_type {printable(model_type)}; supported here: {', '.join(known)}")
    headers, _, variant = find_weights(folder, names, "transformers")
    place, preprocessing = _preprocessing(folder, names)
    paths = [folder / "config.json", place, *(header.path for header in headers)]
    digest = hashlib.sha256("\n".join(sorted(f"{path.name} {files.sha256(path)}" for path in paths)).encode())
    return _from_transformers(folder, *known[model_type], variant), preprocessing, digest.hexdigest()


def _preprocessing(folder: Path, names: Collection[str]) -> tuple[Path, Preprocessing]:
    """Returns the settings for images and their file: one of their own, or the file of all processors (transformers 5).

    Processors of several kinds of input have had a `processor_config.json` for longer; then it says nothing of images.
    """
    found: dict[Path, Preprocessing] = {}
    for name in _PROCESSORS:
        settings = read_untrusted(folder / name) if name in names else {}
        if name == "processor_config.json":
            settings = settings.get("image_processor") or {}
            if not isinstance(settings, dict):
                raise refusal(folder / name, "has an image_processor that is no object")
        try:
            if settings:
                found[folder / name] = preprocessing_from(settings)
        except ValueError as error:
            raise refusal(folder / name, str(error)) from None
    if not found:
        raise refusal(folder, "has neither preprocessor_config.json nor a processor_config.json with image_processor")
    if len(set(found.values())) > 1:
        raise refusal(folder, f"prepares images otherwise in {' than in '.join(_PROCESSORS)}; keep the right one")
    return next(iter(found.items()))


def _from_transformers(folder: Path, class_name: str, options: dict[str, Any], variant: str | None) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError("transformers is not installed; pip install 'diffcore[models]'") from error
    try:
        network, info = getattr(transformers, class_name).from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            variant=variant,
            dtype=torch.float32,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # whatever the library makes of impossible settings
        raise refusal(folder, f"does not load as {class_name} ({printable(error)})") from None
    missing = sorted(map(str, info["missing_keys"]))
    if missing:  # the library fills them with random numbers and goes on
        raise refusal(folder, f"lacks {len(missing)} tensors; first: {printable(missing[0])}")
    return network


def _output(network: nn.Module, x: Tensor) -> Tensor:
    return network(x)


def _from_grey(network: nn.Module, x: Tensor) -> Tensor:
    return network(x.mean(1, keepdim=True))


def _inception_features(network: nn.Module, x: Tensor) -> Tensor:
    """The file's own forward pass would resize once more; its layers do not."""
    return getattr(network, "layers", network)(x)


def _clip_features(network: Any, x: Tensor) -> Tensor:
    return network.visual_projection(network.vision_model(pixel_values=x).pooler_output)


def _class_token(network: nn.Module, x: Tensor) -> Tensor:
    return network(pixel_values=x).last_hidden_state[:, 0]
