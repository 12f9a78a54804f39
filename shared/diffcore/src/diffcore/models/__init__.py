"""Diffusion models that people have on disk, brought into one shape without running anything from them."""

from diffcore.models.backbones import ConditionKeys, backbone_call, condition_keys
from diffcore.models.codec import Codec
from diffcore.models.fingerprint import fingerprint
from diffcore.models.inspect import inspect_model
from diffcore.models.inventory import Component, Inventory
from diffcore.models.load import load, resolve
from diffcore.models.model import DiffusionModel
from diffcore.models.prompts import PromptEncoder, Tokens

__all__ = [
    "Codec",
    "Component",
    "ConditionKeys",
    "DiffusionModel",
    "Inventory",
    "PromptEncoder",
    "Tokens",
    "backbone_call",
    "condition_keys",
    "fingerprint",
    "inspect_model",
    "load",
    "resolve",
]
