"""One training, in every mode that Keras has: the same weights and the same logs."""
