from .activation import Activation as Activation
from .selection import Selection as Selection

__version__: str
