"""One file a foreign format: nothing outside this folder knows foreign names."""
