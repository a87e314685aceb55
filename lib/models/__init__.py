"""The two reference segmenters, the embedders, and their weights."""
