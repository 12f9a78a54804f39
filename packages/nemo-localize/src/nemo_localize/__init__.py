"""Localises memorised captions in the cross-attention value neurons of a text-to-image model, and switches them off.

D. Hintersdorf, L. Struppek et al., "Finding NeMo: Localizing Neurons Responsible For Memorization in Diffusion Models",
NeurIPS 2024.
"""

from importlib.metadata import version

__version__ = version("nemo-localize")
