"""Text from a package whose graph is a decoder: streaming, batches with an adapter per row, caches to go on with."""
