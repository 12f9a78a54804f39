"""Reading configurations of backbones from disk."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import diffcore.testing.real_configs
from diffcore.errors import IncompatibleModelError, ModelNotFoundError
from diffcore.testing import tiny
from diffusion_featsel.files.config import read_backbone_config, read_meta_backbone
from diffusion_featsel.inventory import Inventory, inventory

REAL = Path(diffcore.testing.real_configs.__file__).parent


@pytest.mark.parametrize("place", ["", "unet", "unet/config.json"])
def test_folders_and_files_give_one_inventory(place: str, real_inventory: Callable[[str], Inventory]) -> None:
    assert inventory(read_meta_backbone(REAL / "sd15" / place)) == real_inventory("sd15")


@pytest.mark.parametrize("name", ["sdxl", "pixart-alpha", "sd3", "flux-dev"])
def test_published_pipelines_are_read(name: str, real_config: Callable[[str], dict[str, Any]]) -> None:
    stated, read = real_config(name), read_backbone_config(REAL / name)
    assert {key: value for key, value in read.items() if stated.get(key) != value} == (
        {"_class_name": "PixArtTransformer2DModel"} if name == "pixart-alpha" else {}
    )
    assert {"num_layers", "block_out_channels"} & read.keys()


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    backbone = tiny.backbone("unet2d")
    backbone.save_config(tmp_path)
    assert inventory(read_meta_backbone(tmp_path)) == inventory(backbone)


def test_bad_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="has no configuration of a backbone"):
        read_backbone_config(tmp_path)
    with pytest.raises(ModelNotFoundError, match="nowhere has no configuration"):
        read_backbone_config(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(IncompatibleModelError):
        read_backbone_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(IncompatibleModelError, match="AutoencoderKL, which is no known backbone"):
        read_backbone_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": ["x"]}))
    with pytest.raises(IncompatibleModelError, match="no known backbone"):
        read_backbone_config(tmp_path)
    huge = {"_class_name": "UNet2DModel", "layers_per_block": 10**9}
    (tmp_path / "config.json").write_text(json.dumps(huge))
    with pytest.raises(IncompatibleModelError, match="layers_per_block"):
        read_backbone_config(tmp_path)
