"""Statistics of the inputs of weights: gathering, factorizing, transforming and storing them."""
