"""The harness: console script, report, demo and benchmark. The method modules above know nothing of it."""
