"""The layers inside a model.

Private names used here: `Layer._flatten_layers`. Checked with Keras 3.15.1;
`tests/gradients/test_units.py` fails when it changes.
"""

from __future__ import annotations

from typing import Any


def layers_of(model: Any) -> list[Any]:
    """Returns the model and all layers in it, outer before inner."""
    return list(model._flatten_layers(include_self=True, recursive=True))
