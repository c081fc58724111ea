"""Calibration: where the data comes from, and the walk of the data through the model."""
