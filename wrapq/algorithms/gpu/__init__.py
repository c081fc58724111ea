"""Inner loops of algorithms as single launches on a GPU. Importing a module here needs Triton."""
