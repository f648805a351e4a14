"""What Keras models hide.

Private names used here: `keras.src.models.functional.Functional`,
`keras.src.models.cloning._clone_sequential_model`, `keras.src.utils.naming.auto_name`,
`Sequential._layers`, `Layer._flatten_layers`. Checked with Keras 3.15.1;
`tests/models/test_private_names.py` fails when they change.
"""

from __future__ import annotations

from typing import Any

import keras
from keras.src.models import cloning
from keras.src.models.functional import Functional as KerasFunctional
from keras.src.utils.naming import auto_name as auto_name

__all__ = [
    "KerasFunctional",
    "auto_name",
    "is_assembly",
    "keep_class_when_cloned",
    "parts_are_built",
]


def is_assembly(model: Any) -> bool:
    """Whether a model is nothing but its parts, and these are built: a GAN, say.

    Its step calls the parts, never the model itself, which so is never built.
    """
    return type(model).call is keras.Model.call and parts_are_built(model)


def parts_are_built(model: Any) -> bool:
    """Whether a model that does not build any layer itself has all its weights."""
    if type(model).build is not keras.Model.build:
        return False
    parts = list(model._flatten_layers(include_self=False))
    return bool(parts or model.weights) and all(part.built for part in parts)


def keep_class_when_cloned(cls: Any) -> None:
    """Has `keras.models.clone_model` keep a Sequential class of ours.

    Keras makes a plain `Sequential` of any subclass, and compiles it with a config that
    a plain one may not understand. Models of other classes are cloned as before.
    """
    original = cloning._clone_sequential_model

    def clone_sequential_model(model: Any, clone_function: Any, input_tensors: Any = None) -> Any:
        if not isinstance(model, cls):
            return original(model, clone_function, input_tensors)
        compiled = model.compiled
        model.compiled = False
        try:
            plain = original(model, clone_function, input_tensors)
        finally:
            model.compiled = compiled
        clone = cls(plain._layers, name=model.name, trainable=model.trainable)
        if compiled:
            clone.compile_from_config(model.get_compile_config())
        return clone

    cloning._clone_sequential_model = clone_sequential_model
