"""Programs that make graphs of a checkpoint, one file each: Optimum, and ONNX Runtime GenAI's model builder."""
