"""Small models trained for diffcore, with exact ground truth about their training data.

Every name is imported when it is first used: the list of models needs no torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
