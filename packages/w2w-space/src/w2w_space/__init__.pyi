from .gauge import Gauge as Gauge
from .layout import Layout as Layout
from .population import Population as Population
from .space import Point as Point
from .space import WeightSpace as WeightSpace

__version__: str
