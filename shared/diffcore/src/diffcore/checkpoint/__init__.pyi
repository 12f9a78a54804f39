from .fingerprint import fingerprint as fingerprint
from .inspect import inspect_model as inspect_model
from .inventory import Component as Component
from .inventory import Inventory as Inventory
