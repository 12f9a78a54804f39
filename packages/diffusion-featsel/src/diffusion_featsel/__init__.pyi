from .activation import Activation as Activation
from .inventory import Inventory as Inventory
from .inventory import inventory as inventory
from .presets import preset as preset
from .published import against_paper as against_paper
from .selection import Selection as Selection

__version__: str
