from .calibration import Calibration as Calibration
from .calibration import calibrate as calibrate
from .calibration import threshold as threshold
from .first_step import FirstStep as FirstStep
from .localization import localize as localize
from .neurons import NeuronSet as NeuronSet
from .results import CaptionResult as CaptionResult
from .results import Results as Results
from .settings import SearchSettings as SearchSettings
from .settings import StepSettings as StepSettings
from .sites import ValueSites as ValueSites
from .sites import switched_off as switched_off
from .sites import value_sites as value_sites
from .statistics import Statistics as Statistics
from .statistics import collect_statistics as collect_statistics

__version__: str
