"""Which combinations of values a sweep tries: one file and one registered class per way."""
