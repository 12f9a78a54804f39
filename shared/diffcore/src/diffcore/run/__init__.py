"""Resumable runs: a folder that holds the settings, finished parts, tables, figures and result of one command."""

from diffcore.run.map import RunMap as RunMap
from diffcore.run.run import Run as Run
from diffcore.run.run import input_hash as input_hash
