"""Metrics and pictures."""
