"""Experiments with the couplings: train small models, measure and compare them, and keep all of it in run folders."""
