"""The kinds of modules as graphs hold them: one file a kind, which reads its nodes and builds its branches."""
