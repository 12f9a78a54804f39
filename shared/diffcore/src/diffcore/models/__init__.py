"""Loading diffusion models from files or pipelines into one `DiffusionModel`, without running code from them.

Every name is imported when it is first used: checking a file needs no torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
