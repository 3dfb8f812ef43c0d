"""A package against the model in PyTorch: what is compared, with which adapters, and how far apart they may be."""
