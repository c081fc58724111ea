"""Pure tensor quantization: dtypes, specs, affine arithmetic, packing. Knows nothing of modules, models or recipes."""
