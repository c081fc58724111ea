"""Calibration and evaluation data: samples of token ids, and the sources they come from."""
