"""Keras's tests that `TapeModel` does not pass, each with the reason.

An entry that passes after all, or is not among the tests that pass with Keras's own
classes, is an error: see `run`.
"""

from __future__ import annotations

LEFT_OUT: dict[str, str] = {}
