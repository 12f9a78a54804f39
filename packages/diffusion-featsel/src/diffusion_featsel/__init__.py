"""Lists, filters, ranks, chooses and extracts the inner activations of a diffusion model as dense features.

B. Meng, Q. Xu, Z. Wang, X. Cao, Q. Huang, "Not All Diffusion Model Activations Have Been Evaluated as Discriminative
Features", NeurIPS 2024.
"""

from importlib.metadata import version

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = version("diffusion-featsel")
