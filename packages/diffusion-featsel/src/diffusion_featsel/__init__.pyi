from .activation import Activation as Activation
from .correspond import Matches as Matches
from .correspond import correspond as correspond
from .keypoints import KeypointScores as KeypointScores
from .keypoints import keypoint_scores as keypoint_scores
from .pairs import Pair as Pair
from .probe import ProbeResult as ProbeResult
from .probe import probe as probe
from .select import select as select
from .selection import Selection as Selection

__version__: str
