"""Distils a many-step diffusion teacher into a one-step generator by expectation-maximisation.

S. Xie, Z. Xiao, D. P. Kingma, T. Hou, Y. N. Wu, K. Murphy, T. Salimans, B. Poole, R. Gao, "EM Distillation for One-step
Diffusion Models", NeurIPS 2024.
"""

from importlib.metadata import version

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = version("emd-distill")
