"""Bound adapters as files: ours and ONNX Runtime's."""
