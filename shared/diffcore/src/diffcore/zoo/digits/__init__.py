"""Handwritten digits of 8x8 pixels: a teacher, a base in all styles, and what judges them."""
