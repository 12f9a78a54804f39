"""Files that are read and written: generators, and exported models."""
