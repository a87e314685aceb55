"""MONAI Label strategies: which image to label next."""
