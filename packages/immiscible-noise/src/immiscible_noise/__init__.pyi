from .assign import assign_noise as assign_noise
from .assign import immiscible_noise_like as immiscible_noise_like
from .diagnose import Diagnosis as Diagnosis
from .diagnose import diagnose as diagnose
from .info import AssignmentInfo as AssignmentInfo
from .leak import ClassLeak as ClassLeak
from .select import select_noise as select_noise

__version__: str
