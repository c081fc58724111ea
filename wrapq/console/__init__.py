"""What the command line shows: plans, results, presets, progress."""
