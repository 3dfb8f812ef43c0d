"""What goes into the package's folder: weights in data files, and the manifest's entries."""
