"""The base of every console script: the app, its options, exit codes, progress, and where output goes."""

from diffcore.cli.app import emit as emit
from diffcore.cli.app import main as main
from diffcore.cli.app import make_app as make_app
from diffcore.cli.app import settings as settings
from diffcore.cli.app import show as show
from diffcore.cli.app import track as track
from diffcore.cli.job import Job as Job
from diffcore.cli.options import Flag as Flag
from diffcore.cli.options import Loading as Loading
from diffcore.cli.options import LoadingAny as LoadingAny
from diffcore.cli.options import Output as Output
from diffcore.cli.options import Timing as Timing
from diffcore.cli.options import load_model as load_model
from diffcore.cli.work import Work as Work
