"""Rendered portraits whose every attribute is known, and the text-to-image models trained on them."""
