"""The layers inside a model.

Private names used here: `Layer._flatten_layers`, `Layer._trainable_variables`. Checked
with Keras 3.15.1; `tests/gradients/test_targets.py` fails when they change.
"""

from __future__ import annotations

from typing import Any


def layers_of(model: Any) -> list[Any]:
    """Returns the model and all layers in it, outer before inner."""
    return list(model._flatten_layers(include_self=True, recursive=True))


def has_trainable_weights(layer: Any) -> bool:
    """Whether a layer holds weights that are trained where nothing is frozen."""
    # `trainable_weights` is empty while the layer is frozen.
    return any(part._trainable_variables for part in layers_of(layer))
