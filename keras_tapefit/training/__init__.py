"""One training step, and the function that runs it."""
