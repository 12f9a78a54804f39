"""Fixtures of all tests of diffusion-featsel."""
