"""The execution of plans: runs from data to checkpoint, replays, exports and comparisons of finished runs."""
