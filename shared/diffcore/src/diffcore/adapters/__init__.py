"""LoRA files of every dialect: read, looked into, fused or applied, and written so that all tools agree on them."""

from diffcore.adapters.adapter import Adapter, Changes, LowRank
from diffcore.adapters.base import Base
from diffcore.adapters.fuse import apply, fuse
from diffcore.adapters.read import read_adapter
from diffcore.adapters.scan import AdapterFile, scan_adapter
from diffcore.adapters.write import Format, write_adapter

__all__ = [
    "Adapter",
    "AdapterFile",
    "Base",
    "Changes",
    "Format",
    "LowRank",
    "apply",
    "fuse",
    "read_adapter",
    "scan_adapter",
    "write_adapter",
]
