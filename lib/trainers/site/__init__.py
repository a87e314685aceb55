"""Training of a site's own model: packed cases, split, episodes, loop, validation, publication."""
