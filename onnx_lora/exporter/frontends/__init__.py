"""Where graphs come from, one file a source. Each gives ONNX files, the weights' torch names where it
knows them, and the files that belong to the model."""
