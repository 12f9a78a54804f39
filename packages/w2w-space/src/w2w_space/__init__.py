"""A linear space over many LoRAs of one kind: sample, edit and invert; each result is an ordinary LoRA file.

A. Dravid, Y. Gandelsman, K.-C. Wang, R. Abdal, G. Wetzstein, A. A. Efros, K. Aberman, "Interpreting the Weight Space of
Customized Diffusion Models", NeurIPS 2024.
"""

from importlib.metadata import version

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = version("w2w-space")
