"""Where points and whole weights can go, and which of these places are asked for. Nothing here changes a graph."""
