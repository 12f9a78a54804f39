"""The harness of w2w-space: command line, reports, demo and benchmark."""
