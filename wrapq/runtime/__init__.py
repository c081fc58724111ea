"""What runs after `convert`: modules that hold integers, scales and zero points instead of float weights."""
