import os

# Before torch is imported: two actively waiting OpenMP threads are many times slower than one on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

pytest_plugins = ["diffcore.testing.fixtures"]
