from .activation import Activation as Activation
from .inventory import Inventory as Inventory
from .inventory import inventory as inventory
from .selection import Selection as Selection

__version__: str
