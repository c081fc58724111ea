"""Quantized stand-ins of modules: each declares its quantization points and runs the module's function through them."""
