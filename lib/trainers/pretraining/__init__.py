"""Pretraining of the bundled network: packed data, tasks, episodes, losses, the loop."""
