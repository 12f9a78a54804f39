from .correspond import correspond as correspond
from .extractor import FeatureExtractor as FeatureExtractor
from .inventory import Inventory as Inventory
from .inventory import inventory as inventory
from .keypoints import keypoint_scores as keypoint_scores
from .measured_filter import measured_filter as measured_filter
from .paper_filter import paper_filter as paper_filter
from .presets import preset as preset
from .probe import probe as probe
from .published import against_paper as against_paper
from .rank import score as score
from .ranking import Ranking as Ranking
from .select import select as select
from .selection import Selection as Selection

__version__: str
