"""LoRA files of every dialect: read, looked into, fused or applied, and written so that all tools agree on them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
