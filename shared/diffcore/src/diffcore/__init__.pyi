from .errors import CorruptArtifactError as CorruptArtifactError
from .errors import IncompatibleModelError as IncompatibleModelError
from .errors import MachineError as MachineError
from .errors import MissingDependencyError as MissingDependencyError
from .errors import ModelNotFoundError as ModelNotFoundError
from .errors import NoMatchError as NoMatchError
from .errors import RunMismatchError as RunMismatchError
from .errors import UserError as UserError
from .io.artifact import Artifact as Artifact
from .models import from_pipeline as from_pipeline
from .models import generate as generate
from .models import load as load
from .report import Report as Report
from .run import Run as Run
from .runtime import Runtime as Runtime

__version__: str
