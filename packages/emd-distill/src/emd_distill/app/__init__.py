"""The command line, report, demo and benchmarks of the package."""
