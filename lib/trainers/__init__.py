"""Training: the bundled network's pretraining."""
