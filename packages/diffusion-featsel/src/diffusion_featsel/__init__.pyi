from .extractor import FeatureExtractor as FeatureExtractor
from .inventory import Inventory as Inventory
from .inventory import inventory as inventory
from .keypoints import keypoint_scores as keypoint_scores
from .match import match_points as match_points
from .measured_filter import measured_filter as measured_filter
from .paper_filter import paper_filter as paper_filter
from .prepare import prepare as prepare
from .presets import preset as preset
from .protocol import Protocol as Protocol
from .published import against_paper as against_paper
from .rank import score as score
from .ranking import Ranking as Ranking
from .selection import Selection as Selection

__version__: str
