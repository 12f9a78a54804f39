"""Noise assignment for training diffusion and flow models: each image is diffused towards noise that is near it.

Y. Li et al., "Immiscible Diffusion: Accelerating Diffusion Training with Noise Assignment", NeurIPS 2024, and
Y. Li et al., "Improved Immiscible Diffusion", 2025. One line in a training step:

    noise = assign_noise(x, noise)
"""

from importlib.metadata import version

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = version("immiscible-noise")
