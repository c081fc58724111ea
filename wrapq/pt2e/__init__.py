"""Parts of a model that PyTorch 2's export quantization (PT2E) quantizes, by torchao, beside what wrapq does itself."""
