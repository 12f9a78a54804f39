from .truth import Memorised as Memorised
from .truth import Portraits as Portraits
from .truth import identities as identities
from .truth import keypoints as keypoints
from .truth import masks as masks
from .truth import memorised as memorised
