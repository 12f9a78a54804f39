"""Helpers that the tests of diffcore and of every technique share; shipped, so that other packages may use them."""
