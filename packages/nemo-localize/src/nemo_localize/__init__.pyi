from .audit import audit as audit
from .calibrate import calibrate as calibrate
from .detect import detect as detect
from .evaluate import evaluate as evaluate
from .files.export import export as export
from .files.export import restore as restore
from .first_step import FirstStep as FirstStep
from .generate import generate as generate
from .localize import localize as localize
from .localize import localize_caption as localize_caption
from .minimal_set import minimal_set as minimal_set
from .neurons import NeuronSet as NeuronSet
from .settings import ImageSettings as ImageSettings
from .settings import SearchSettings as SearchSettings
from .settings import StepSettings as StepSettings
from .statistics import collect_statistics as collect_statistics
from .verify import verify as verify

__version__: str
