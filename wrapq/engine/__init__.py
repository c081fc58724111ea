"""The execution of plans: runs and their folders, checkpoints, locks, and the Python API over the same parts."""
