"""One file a method: the names of its tensors and of its config's fields, what they do to a weight, its row of the
docs. `registry.py` lists them. None knows a file or a package.
"""
