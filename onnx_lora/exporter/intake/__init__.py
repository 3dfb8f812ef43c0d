"""From an ONNX file to a model in memory that the passes can trust: read, checked, its functions inlined."""
