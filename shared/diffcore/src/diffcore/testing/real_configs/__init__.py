"""Configurations of published models, as data; the README beside this file names their sources."""
