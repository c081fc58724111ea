"""ONNX: importing a module here needs onnxscript, with which torch exports to it."""
