"""Reports: one HTML file that needs nothing else, and the figures in it."""

from diffcore.errors import MissingDependencyError

try:
    import jinja2 as _jinja2
    import matplotlib as _matplotlib
except ImportError as error:
    raise MissingDependencyError(f"reports need {error.name}; pip install 'diffcore[report]'") from error

from diffcore.report.figures import Series, bar_with_interval, histogram, image_grid, lines_with_band
from diffcore.report.report import Report

__all__ = ["Report", "Series", "bar_with_interval", "histogram", "image_grid", "lines_with_band"]

del _jinja2, _matplotlib
