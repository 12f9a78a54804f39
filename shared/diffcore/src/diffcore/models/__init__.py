"""Diffusion models that people have on disk, brought into one shape without running anything from them.

Every name is imported when it is first used: the gate needs no torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
