"""A recipe against a model on the meta device: rules become specs, the stack becomes stages, and both become a plan."""
