from .ahead import AssignedAhead as AssignedAhead
from .assign import assign_noise as assign_noise
from .assign import immiscible_noise_like as immiscible_noise_like
from .callback import ImmiscibleCallback as ImmiscibleCallback
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
from .plan import NoisePlan as NoisePlan
from .plan_sampler import ExactAssignmentPlanSampler as ExactAssignmentPlanSampler
from .pool import choose_noise as choose_noise
from .ranks import assign_across_ranks as assign_across_ranks
from .samplers import is_stochastic as is_stochastic
from .samplers import warn_if_stochastic as warn_if_stochastic
from .select import select_noise as select_noise
from .soft import SoftAssignment as SoftAssignment
from .soft import assign_noise_softly as assign_noise_softly

__version__: str
