"""Test helpers that diffcore and every technique share; shipped, so that other packages may use them."""
