from .assign import assign_noise as assign_noise
from .assign import immiscible_noise_like as immiscible_noise_like
from .consistency import consistency_distillation_loss as consistency_distillation_loss
from .consistency import consistency_sample as consistency_sample
from .consistency import consistency_training_loss as consistency_training_loss
from .coupling import PRESETS as PRESETS
from .coupling import Coupling as Coupling
from .diagnose import CouplingStatistics as CouplingStatistics
from .diagnose import Diagnosis as Diagnosis
from .diagnose import Recommendation as Recommendation
from .diagnose import diagnose as diagnose
from .info import AssignmentInfo as AssignmentInfo
from .leak import ClassLeak as ClassLeak
from .leak import class_leak as class_leak
from .select import select_noise as select_noise

__version__: str
