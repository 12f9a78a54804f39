
__version__: str
from .activation import Activation as Activation
from .extractor import FeatureExtractor as FeatureExtractor
from .inventory import Inventory as Inventory
from .inventory import inventory as inventory
from .prepare import Placement as Placement
from .prepare import Prepared as Prepared
from .prepare import image_keys as image_keys
from .prepare import prepare as prepare
from .protocol import Conditions as Conditions
from .protocol import Protocol as Protocol
from .protocol import encode as encode
from .selection import Selection as Selection
