"""Containers of tensors: how their bytes are read, whatever format lies in them."""
