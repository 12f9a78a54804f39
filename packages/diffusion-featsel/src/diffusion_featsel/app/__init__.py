"""Commands, report, demo and benchmarks around the method."""
