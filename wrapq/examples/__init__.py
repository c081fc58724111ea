"""Examples of the Python API, each run with `python -m wrapq.examples.NAME` and read from top to bottom."""
