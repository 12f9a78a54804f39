"""What commands read: models without weights, images, features by name or file, and labelled data."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffcore.digests import digest_of
from diffcore.errors import UserError, printable
from diffcore.io.files import sha256
from diffcore.io.strictjson import read_untrusted
from diffcore.models import DiffusionModel
from diffusion_featsel.app.options import Extraction
from diffusion_featsel.extractor import FeatureExtractor
from diffusion_featsel.files.images import ImageList, ListedImage
from diffusion_featsel.files.masks import MaskedImages, list_masked
from diffusion_featsel.files.pairs import read_pairs
from diffusion_featsel.files.spair import read_spair
from diffusion_featsel.inventory import Inventory, inventory
from diffusion_featsel.pairs import Pair
from diffusion_featsel.presets import PRESETS
from diffusion_featsel.protocol import Protocol
from diffusion_featsel.selection import Selection

Task = Literal["correspondence", "segmentation"]
_SELECTION_BYTES = 2**20
_REMEMBERED = 64  # images whose features are kept while pairs are gone through


def features_named(features: Sequence[str]) -> Selection | str | list[str]:
    """Returns the features that a command line names: a selection on disk, a preset, or activations.

    Args:
        features: Words of the command line.

    Raises:
        UserError: A file is no selection.
    """
    if not features:
        raise UserError("no `features` are named; give a preset, a selection.json, or names of activations")
    if len(features) == 1:
        path = Path(features[0])
        path = path / "selection.json" if (path / "selection.json").is_file() else path
        if path.suffix == ".json" and path.is_file():
            return _selection(path)
        if path.is_dir():
            raise UserError(f"`features` is {printable(path, 300)}, a folder without a selection.json")
        if path.suffix == ".json":
            raise UserError(f"`features` is {printable(path, 300)}, and there is no such file")
        if "/" in features[0]:
            if features[0] not in PRESETS:
                raise UserError(
                    f"`features` is {printable(features[0])!r}, neither a file nor a preset; the presets are "
                    f"{', '.join(PRESETS)}"
                )
            return features[0]
    return list(features)


def _selection(path: Path) -> Selection:
    values = read_untrusted(path)
    try:
        return Selection.from_json(values)
    except (TypeError, KeyError, AttributeError):
        raise UserError(f"{printable(path)} is no selection; give the selection.json that `select` writes") from None


def digests(features: Sequence[str], *paths: Path | None) -> dict[str, str]:
    """Returns the digest of each file that is among the features or paths, by its name.

    Args:
        features: Words of the command line.
        *paths: Further files; those that are folders or missing are left out.
    """
    named = [Path(word) for word in features] + [path for path in paths if path is not None]
    named = [path / "selection.json" if (path / "selection.json").is_file() else path for path in named]
    return {printable(path.name): sha256(path) for path in named if path.is_file()}


def make_extractor(
    model: DiffusionModel, features: Selection | str | Sequence[str], extraction: Extraction, **settings: Any
) -> FeatureExtractor:
    """Returns the extractor that the options describe.

    Args:
        model: Diffusion model that is looked into.
        features: Selection, name of a preset, or names of activations.
        extraction: Options of the command line.
        **settings: Further settings of the extractor.
    """
    return FeatureExtractor(
        model,
        features,
        t=extraction.timestep,
        prompt=extraction.prompt,
        protocol=extraction.protocol,
        seed=extraction.seed,
        draws=extraction.draws,
        size=extraction.size,
        mode=extraction.mode,
        batch_size=extraction.rows(),
        **settings,
    )


def protocol_of(extraction: Extraction) -> Protocol:
    """Returns how images enter the network, by the options.

    Args:
        extraction: Options of the command line.
    """
    changes = {"size": extraction.size, "mode": extraction.mode, "seed": extraction.seed}
    return Protocol.paper(**changes) if extraction.protocol == "paper" else Protocol(**changes)


def images_at(
    model: DiffusionModel, path: Path, extraction: Extraction, limit: int | None = None
) -> tuple[Float[Tensor, "n 3 h w"], ImageList, Inventory]:
    """Returns the distinct images of a folder at the size of the network, their list, and the inventory for that size.

    Args:
        model: Diffusion model that is looked into.
        path: Folder, archive or file of images.
        extraction: Options of the command line.
        limit: Largest number of images.

    Raises:
        UserError: There is no readable image, or images of mode native differ in size.
    """
    listed = ImageList.of(path)
    chosen = _spread(listed.distinct, limit)
    protocol = protocol_of(extraction)
    published = protocol.published
    pictures: Sequence[Any] = listed.pictures(chosen) if published else pixels_of_files(listed, chosen)
    prepared = protocol.prepare(model, pictures)
    return prepared.images, listed, inventory_at(model, (prepared.images.shape[2], prepared.images.shape[3]))


def inventory_at(model: DiffusionModel, size: tuple[int, int]) -> Inventory:
    """Returns the inventory for images of a size.

    Args:
        model: Diffusion model that is looked into.
        size: Height and width of the prepared images in pixels.
    """
    factor = int(getattr(model.codec, "factor", 1))
    return inventory(model, size=(size[0] // factor, size[1] // factor))


def _spread(images: Sequence[ListedImage], limit: int | None) -> list[ListedImage]:
    """Returns at most `limit` images, spread evenly over the list."""
    if limit is None or len(images) <= limit:
        return list(images)
    return [images[place * len(images) // limit] for place in range(limit)]


def pixels_of_files(listed: ImageList, images: Sequence[ListedImage]) -> list[Tensor]:
    """Returns the 8-bit pixels (3, height, width) of some images of a list.

    Args:
        listed: List that the images are in.
        images: Images of the list.
    """
    return [torch.from_numpy(pixels).movedim(2, 0) for pixels in listed.read(images)]


@dataclass(eq=False)
class PairData:
    """Pairs of images with key points, and a function of image names to features.

    Attributes:
        pairs: Pairs of images with their key points.
        root: Folder that names of images are relative to; None where images are in memory.
        images: Images by name, where they are in memory.
        name: Word for the data set in tables.
    """

    pairs: Sequence[Pair]
    root: Path | None
    images: Mapping[str, Tensor] = field(default_factory=dict)
    name: str = ""

    def reader(self, extractor: FeatureExtractor) -> Callable[[list[str]], dict[str, Tensor]]:
        """Returns a function of names to features, which remembers the last images.

        Args:
            extractor: Extractor that computes the features.
        """
        kept: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

        def features(names: list[str]) -> dict[str, Tensor]:
            new = [name for name in dict.fromkeys(names) if name not in kept]
            if new:
                maps = extractor([self.picture(name) for name in new])
                for place, name in enumerate(new):
                    kept[name] = {key: value[place] for key, value in maps.items()}
            rows = [kept[name] for name in names]
            for name in names:
                kept.move_to_end(name)
            while len(kept) > max(_REMEMBERED, len(names)):
                kept.popitem(last=False)
            return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

        return features

    def picture(self, name: str) -> Any:
        """Returns an image of the data set.

        Args:
            name: Name of the image in its pairs.

        Raises:
            UserError: The file cannot be read.
        """
        if self.root is None:
            return self.images[name]
        listed = ImageList.of(self.root / name)
        return pixels_of_files(listed, listed.images)[0]


def read_pair_data(data: str, *, split: str = "test", layout: Literal["large", "small"] = "large") -> PairData:
    """Returns pairs of images: SPair-71k, a list in JSON, or the zoo's portraits.

    Args:
        data: Folder, file, or zoo:portraits.
        split: Name of a split of SPair-71k.
        layout: List of SPair-71k's pairs, all or few.

    Raises:
        UserError: It is none of these.
    """
    if data == "zoo:portraits":
        from diffusion_featsel.app.portraits import portraits

        known = portraits(120, 200)
        return PairData(known.pairs, None, known.images, data)
    path = Path(data)
    if path.is_file():
        return PairData(read_pairs(path), path.parent, name=path.name)
    if split not in ("trn", "val", "test"):
        raise UserError(f"`split` is {printable(split)!r}; SPair-71k has trn, val and test")
    pairs = read_spair(path, split, layout=layout)  # type: ignore[arg-type]
    return PairData(sorted(pairs, key=lambda pair: pair.category), path, name=f"{path.name} {split}")


@dataclass(frozen=True, eq=False)
class MaskData:
    """Images with the class of each pixel.

    Attributes:
        pictures: The images, of any size.
        labels: Class of each pixel on the grid of the probe; 255 where it does not count.
        num_classes: Number of classes in the masks.
        name: Word for the data set in tables.
    """

    pictures: Sequence[Any]
    labels: Tensor
    num_classes: int
    name: str


def check_training(num_train: int | None, count: int) -> None:
    """Raises a UserError where a number of training images leaves none for one side.

    Args:
        num_train: Number of training images, if it is given.
        count: Number of all images.
    """
    if num_train is not None and not 0 < num_train < count:
        raise UserError(f"`num_train` is {num_train} of {count} images; leave at least one for each side")


def read_prompts(path: Path | None) -> dict[str, str] | None:
    """Returns the prompt of each image, from a JSON object of file names and prompts.

    Args:
        path: The file, if there is one.

    Raises:
        UserError: The file holds something else.
    """
    if path is None:
        return None
    values = read_untrusted(path)
    if not all(isinstance(value, str) for value in values.values()):
        raise UserError(
            f"`prompts` is {printable(path, 300)}, which has an entry that is no text; give each file name its prompt"
        )
    return values


def digest_of_data(data: PairData | MaskData) -> str:
    """Returns a digest of labelled data: points of pairs, or classes of pixels.

    Args:
        data: Pairs with key points, or images with masks.
    """
    if isinstance(data, PairData):
        return digest_of(
            repr([(p.source, p.target, p.source_points.tolist(), p.target_points.tolist()) for p in data.pairs])
        )
    return digest_of(repr(data.labels.tolist()))


def read_mask_data(data: str, grid: tuple[int, int], num_classes: int | None = None) -> MaskData:
    """Returns images with masks: a folder, or the zoo's portraits.

    Args:
        data: Folder of images with masks, or zoo:portraits.
        grid: Rows and columns of the probe.
        num_classes: Number of classes; by default one more than the largest in the masks.

    Raises:
        UserError: There is no image with a mask, or a class does not exist.
    """
    if data == "zoo:portraits":
        from diffusion_featsel.app.portraits import NUM_CLASSES, portraits
        from diffusion_featsel.gram import labels_on_grid

        known = portraits(120, 1)
        return MaskData(list(known.plain), labels_on_grid(known.labels.long(), grid), NUM_CLASSES, data)
    masked: MaskedImages = list_masked(data)
    labels = masked.labels(grid, num_classes)
    counted = labels[labels != 255]
    if not len(counted):
        raise UserError(f"{printable(data)} has masks without any pixel that counts; all are 255")
    most = int(counted.max()) + 1 if num_classes is None else num_classes
    return MaskData([masked.image(place) for place in range(len(masked))], labels, most, Path(data).name)
