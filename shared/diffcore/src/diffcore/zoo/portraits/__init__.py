"""Drawn portraits with everything about them known, and the text-to-image models that were trained on them."""
