"""Data sets from untrusted files, which are read, never executed and never extracted."""

from diffcore.data.files import UnreadableFileError
from diffcore.data.images import ImageSet, load_images, resize
from diffcore.data.prompts import PromptSet, load_prompts
from diffcore.data.source import ImageSource, list_images, open_images

__all__ = [
    "ImageSet",
    "ImageSource",
    "PromptSet",
    "UnreadableFileError",
    "list_images",
    "load_images",
    "load_prompts",
    "open_images",
    "resize",
]
