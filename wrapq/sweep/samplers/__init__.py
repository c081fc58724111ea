"""Samplers, which choose the values that a sweep tries: one file and one registered class per method."""
