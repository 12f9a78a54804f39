"""The harness: console script, commands, report, demo and benchmark. The method modules above know nothing of it."""
