"""Models of handwritten digits of 8x8 pixels: a teacher, a base model of all styles, and their classifiers."""
