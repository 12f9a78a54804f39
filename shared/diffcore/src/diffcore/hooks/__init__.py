"""Reading and editing activations of a running network without changing its code."""

from diffcore.hooks.attach import clear
from diffcore.hooks.attention import NamedReduction, Reduction, attention_probs
from diffcore.hooks.capture import Activations, capture
from diffcore.hooks.intervene import Branch, Edit, intervene
from diffcore.hooks.match import Site, match
from diffcore.hooks.sites import SiteRow, SiteTable, trace_sites
from diffcore.hooks.stream import StreamedBatch, stream

__all__ = [
    "Activations",
    "Branch",
    "Edit",
    "NamedReduction",
    "Reduction",
    "Site",
    "SiteRow",
    "SiteTable",
    "StreamedBatch",
    "attention_probs",
    "capture",
    "clear",
    "intervene",
    "match",
    "stream",
    "trace_sites",
]
