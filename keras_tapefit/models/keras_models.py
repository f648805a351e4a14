"""What Keras models hide.

Private names used here: `keras.src.models.functional.Functional`,
`keras.src.models.cloning._clone_sequential_model`, `keras.src.utils.naming.auto_name`,
`Sequential._layers`, `Model._unpickle_model`, `Layer._trainable_variables`,
`_non_trainable_variables` and `_track_variable`. Checked with Keras 3.15.1;
`tests/models/test_private_names.py` fails when they change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras.src.models import cloning
from keras.src.models.functional import Functional as KerasFunctional
from keras.src.utils.naming import auto_name as auto_name

__all__ = [
    "KerasFunctional",
    "auto_name",
    "adopt",
    "keep_class_when_cloned",
    "unpickle",
]


def unpickle(*arguments: Any) -> Any:
    """Makes a model of what pickle kept of it."""
    return keras.Model._unpickle_model(*arguments)


def adopt(model: Any, variable: Any, make: Callable[[], keras.Variable]) -> None:
    """Has a model own a `tf.Variable`, by the `keras.Variable` made for it."""
    tracked = [*model._trainable_variables, *model._non_trainable_variables]
    if any(v.value is variable for v in tracked):
        return
    with keras.name_scope(model.name, caller=model):
        model._track_variable(make())


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
