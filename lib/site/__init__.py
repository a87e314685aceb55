"""A site's own models: the store of their versions, and which one answers now."""
