"""Data sets from files of strangers: read, never executed, never extracted."""

from diffcore.data.files import UnreadableFileError
from diffcore.data.images import ImageSet, ImageSource, load_images, open_images, resize

__all__ = ["ImageSet", "ImageSource", "UnreadableFileError", "load_images", "open_images", "resize"]
