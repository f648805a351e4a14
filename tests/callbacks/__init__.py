"""Callbacks that show gradients, and the records that they read."""
