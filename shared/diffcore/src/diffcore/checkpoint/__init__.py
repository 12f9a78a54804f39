"""Reading untrusted checkpoints: files are listed, checked and described before any of them is loaded.

Every name is imported when it is first used, and nothing here needs torch before a weight is read.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
