"""Observers reduce a stream of tensors, or one tensor at hand, to the range that a static spec quantizes."""
