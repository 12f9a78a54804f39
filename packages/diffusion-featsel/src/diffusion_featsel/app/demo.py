"""The demo: all activations of a small model ranked without labels, and the ranking held against exact labels."""

_T = 50.0
