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


@pytest.mark.parametrize("name", ["sd21", "sdxl", "pixart-alpha", "sd3", "flux-dev"])
def test_published_pipelines_are_read(name: str, real_config: Callable[[str], dict[str, Any]]) -> None:
    stated = real_config(name)
    read = read_backbone_config(REAL / name)
    assert {key: stated[key] for key in read if key in stated and key != "_class_name"} == {
        key: read[key] for key in read if key in stated and key != "_class_name"
    }


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    backbone = tiny.backbone("unet2d")
    backbone.save_config(tmp_path)
    assert inventory(read_meta_backbone(tmp_path)) == inventory(backbone)


def test_bad_places_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="config.json is not there"):
        read_backbone_config(tmp_path)
    with pytest.raises(ModelNotFoundError, match="nowhere is not there"):
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
