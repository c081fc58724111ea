"""Launchers, which run the jobs of a sweep: one file and one registered class per engine."""
