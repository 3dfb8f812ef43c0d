"""One small file a method: what its tensors make of a weight. None knows how a file or a format names them."""
