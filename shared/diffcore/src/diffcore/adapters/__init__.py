"""LoRA files in every naming convention: reading, inspecting, fusing, applying, and writing for all tools alike."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
