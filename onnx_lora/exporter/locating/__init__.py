"""Which nodes of a graph compute which module, and what speaks against it. Nothing here changes a graph."""
