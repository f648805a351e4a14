"""Tests of how gradients reach weights. A package, so that file names may recur."""
