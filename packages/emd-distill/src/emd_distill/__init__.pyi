from .chain import langevin_eps_z as langevin_eps_z
from .chain import langevin_x_z as langevin_x_z
from .distill import Settings as Settings
from .distill import distill as distill
from .generator import OneStepGenerator as OneStepGenerator
from .generator import level_of as level_of
from .lora import LoraDenoiser as LoraDenoiser
from .losses import EMD as EMD
from .losses import SiD as SiD
from .losses import diff_instruct as diff_instruct
from .losses import dmd as dmd
from .module import DistillModule as DistillModule
from .noise_levels import noise_levels as noise_levels
from .warm_start import smaller as smaller
from .warm_start import warm_start as warm_start

__version__: str
