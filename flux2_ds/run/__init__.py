"""A run directory and what watches it."""
