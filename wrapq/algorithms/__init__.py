"""The algorithms of the stack, one file each: the paper's formula as a tensor function, then its declaration."""
