"""Annotation campaigns replayed on labelled folders: how many labels buy which Dice."""
