"""A graph in memory: its values, products, shapes, and the names in it. Nothing here knows LoRA, or changes a graph."""
