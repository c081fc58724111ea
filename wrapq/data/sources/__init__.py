"""Where calibration and evaluation text comes from: one file and one registered class per kind of source."""
