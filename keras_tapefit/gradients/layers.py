"""The layers inside a model.

Private names used here: `Layer._flatten_layers`, `Layer._trainable_variables`. Checked
with Keras 3.15.1; `tests/gradients/test_targets.py` fails when they change.
"""

from __future__ import annotations

from typing import Any

import keras

NamedLayer = tuple[str, Any]
"""The path of a layer in its model, and the layer."""


def layers_of(model: Any) -> list[Any]:
    """Returns the model and all layers in it, outer before inner."""
    return list(model._flatten_layers(include_self=True, recursive=True))


def _is_layer(value: Any) -> bool:
    return isinstance(value, keras.layers.Layer)


def has_trainable_weights(layer: Any) -> bool:
    """Whether a layer holds weights that are trained where nothing is frozen."""
    # `trainable_weights` is empty while the layer is frozen.
    return any(part._trainable_variables for part in layers_of(layer))


def layer_path(variable_path: str) -> str:
    """Returns the path of the layer that holds a variable; of a bare one its own."""
    return variable_path.rpartition("/")[0] or variable_path


def own_weights(layer: Any) -> list[Any]:
    """Returns the weights that a layer holds itself, those that are frozen too."""
    return list(layer._trainable_variables)


def named_layers(model: Any) -> list[NamedLayer]:
    """Returns the layers in a model, each with its path: names from the outside in.

    Outer before inner; input layers are left out, and operations of a functional model,
    such as `keras.ops.sqrt(x)`, count. The model itself has no path, and a layer that is
    held in several places the first one.
    """
    found: dict[int, NamedLayer] = {}
    taken: set[str] = set()

    def walk(outer: Any, prefix: str) -> None:
        held = outer._flatten_layers(include_self=False, recursive=False)
        operations = [o for o in getattr(outer, "operations", ()) if not _is_layer(o)]
        for layer in [*held, *operations]:
            if id(layer) in found or layer is model or isinstance(layer, keras.layers.InputLayer):
                continue
            path, number = prefix + layer.name, 1
            while path in taken:
                path, number = f"{prefix}{layer.name}_{number}", number + 1
            taken.add(path)
            found[id(layer)] = (path, layer)
            if _is_layer(layer):
                walk(layer, f"{path}/")

    walk(model, "")
    return list(found.values())
