from .compose import compose as compose
from .diagnose import diagnosed as diagnosed
from .directions import Directions as Directions
from .directions import find_directions as find_directions
from .edit import edit as edit
from .gauge import Gauge as Gauge
from .inject import inject as inject
from .instance import Instance as Instance
from .invert import invert as invert
from .labels import Labels as Labels
from .layout import Layout as Layout
from .population import Population as Population
from .recipe import Recipe as Recipe
from .refine import refine as refine
from .render import render as render
from .sample import sample as sample
from .slider import slider as slider
from .space import Point as Point
from .space import WeightSpace as WeightSpace
from .swap import LiveAdapter as LiveAdapter
from .swap import swap as swap
from .train_population import train_population as train_population

__version__: str
