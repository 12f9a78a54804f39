"""Localizes memorised captions in the cross-attention value neurons of a text-to-image model, and ablates these.

D. Hintersdorf, L. Struppek et al., "Finding NeMo: Localizing Neurons Responsible For Memorization in Diffusion Models",
NeurIPS 2024.
"""

from importlib.metadata import version

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = version("nemo-localize")
