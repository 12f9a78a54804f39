"""Data sets from files of strangers: read, never executed, never extracted."""

from diffcore.data.files import UnreadableFileError
from diffcore.data.images import ImageSet, ImageSource, list_images, load_images, open_images, resize
from diffcore.data.prompts import PromptSet, load_prompts

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
