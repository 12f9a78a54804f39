"""What is read from files and written to them: results, statistics, thresholds, edited checkpoints."""
