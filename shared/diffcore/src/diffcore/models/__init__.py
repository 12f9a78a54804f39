"""Diffusion models that people have on disk, brought into one shape without running anything from them."""

from diffcore.models.backbones import ConditionKeys, backbone_call, condition_keys

__all__ = ["ConditionKeys", "backbone_call", "condition_keys"]
