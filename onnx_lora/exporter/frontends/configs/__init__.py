"""A checkpoint's config.json: read, translated from newer libraries, and what its names mean."""
