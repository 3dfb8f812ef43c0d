"""A model's weights by the names they have in PyTorch, wherever they lie, and finding a graph's weight among them."""
