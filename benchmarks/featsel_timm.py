"""Compares the backbone form of diffusion-featsel with timm: `FeatureInfo`, and the list of maps of `features_only`.

One difference is wanted: indices beyond the maps are refused at once, where timm fails at the first use.

timm brings torchvision, so it stays out of the workspace: `make integrations` runs this in an environment of its own.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from timm import create_model  # pyright: ignore[reportMissingImports]
from timm.models import FeatureInfo as TimmFeatureInfo  # pyright: ignore[reportMissingImports]

from diffcore.models import from_pipeline
from diffcore.testing import tiny
from diffusion_featsel.backbone_form import FeatureInfo
from diffusion_featsel.extractor import FeatureExtractor

CALLS: dict[str, Callable[[Any], Any]] = {
    "channels()": lambda info: info.channels(),
    "channels(1)": lambda info: info.channels(1),
    "channels(-1)": lambda info: info.channels(-1),
    "channels([0, 2])": lambda info: info.channels([0, 2]),
    "channels((0,))": lambda info: info.channels((0,)),
    "reduction()": lambda info: info.reduction(),
    "reduction(0)": lambda info: info.reduction(0),
    "module_name()": lambda info: info.module_name(),
    "module_name(2)": lambda info: info.module_name(2),
    "get('num_chs')": lambda info: info.get("num_chs"),
    "get('reduction', 1)": lambda info: info.get("reduction", 1),
    "get('nothing')": lambda info: info.get("nothing"),
    "get_dicts()": lambda info: info.get_dicts(),
    "get_dicts(keys)": lambda info: info.get_dicts(keys=["num_chs", "reduction"]),
    "get_dicts(keys, 1)": lambda info: info.get_dicts(keys=["num_chs"], idx=1),
    "get_dicts(None, 0)": lambda info: info.get_dicts(None, 0),
    "get_dicts(None, [2, 0])": lambda info: info.get_dicts(None, [2, 0]),
    "[1]": lambda info: info[1],
    "[9]": lambda info: info[9],
    "len": len,
    "out_indices": lambda info: tuple(info.out_indices),
    "from_other": lambda info: info.from_other((1,)).channels(),
}


def outcome(call: Callable[[Any], Any], info: Any) -> Any:
    try:
        return call(info)
    except Exception as error:
        return type(error).__name__


def compare() -> list[str]:
    """Returns one line for each difference."""
    names = ["mid-vit-out", "up-level0-upsampler-out", "up-level1-repeat0-vit-block0-cross-q"]
    extractor = FeatureExtractor(from_pipeline(tiny.pipeline("sd15")), names)
    rows = [dict(row) for row in extractor.as_backbone().feature_info.info]
    wrong = []
    for indices in ((0, 1, 2), (1,), (2, 0), (0, 2), (-1,), (-1, 0)):
        theirs, ours = TimmFeatureInfo([*rows], indices), FeatureInfo(rows, indices)
        for name, call in CALLS.items():
            expected, found = outcome(call, theirs), outcome(call, ours)
            if expected != found or type(expected) is not type(found):
                wrong.append(f"out_indices={indices}: {name} is {expected!r} in timm and {found!r} here")
    wrong += contract("timm's resnet18", create_model("resnet18", features_only=True, out_indices=(1, 3)), 64)
    wrong += contract("timm's own, from the end", create_model("resnet18", features_only=True, out_indices=(-1,)), 64)
    wrong += contract("ours", extractor.as_backbone(), 16)
    wrong += contract("ours, from the end", extractor.as_backbone(out_indices=(-1,)), 16)
    return wrong


def contract(what: str, body: Any, side: int) -> list[str]:
    """Returns what a backbone does not keep of what heads rely on; timm's own is held to the same."""
    maps = body(torch.rand(2, 3, side, 2 * side))
    info = body.feature_info
    checks = {
        "returns a list": isinstance(maps, list),
        "has as many maps as out_indices": len(maps) == len(info.out_indices) == len(info.channels()),
        "has the channels it says": [m.shape[1] for m in maps] == list(info.channels()),
        "has the reduction it says": [side // m.shape[2] for m in maps] == list(info.reduction()),
        "keeps proportions": all(m.shape[3] == 2 * m.shape[2] for m in maps),
        "goes from fine to coarse": list(info.reduction()) == sorted(info.reduction()),
        "is NCHW": str(getattr(body, "output_fmt", "NCHW")).endswith("NCHW"),
    }
    return [f"{what}: not so that it {name}" for name, good in checks.items() if not good]


if __name__ == "__main__":
    import timm  # pyright: ignore[reportMissingImports]

    differences = compare()
    print(f"timm {timm.__version__}: {len(CALLS)} calls of FeatureInfo for each of 6 out_indices, and two networks")
    print("\n".join(differences) or "no difference")
    sys.exit(bool(differences))
