"""Bare `tf.Variable` attributes of a model, in the style of TensorFlow's own guides."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf


class AdoptedVariable(keras.Variable):
    """A Keras variable whose value is a `tf.Variable` that somebody made.

    Args:
        variable: the `tf.Variable`.
        name: the attribute that holds it.
    """

    def __init__(self, variable: tf.Variable, name: str) -> None:
        self._adopted = variable
        super().__init__(
            initializer="zeros",
            shape=tuple(variable.shape),
            dtype=variable.dtype.base_dtype.name,
            trainable=variable.trainable,
            autocast=False,
            name=name,
        )

    def _initialize(self, value: Any) -> None:
        # Keras's own place for making the value; this one is made already.
        self._value = self._adopted


def find(name: str, value: Any) -> Iterator[tuple[str, tf.Variable]]:
    """Yields the bare variables in an attribute's value, with a name for each."""
    if isinstance(value, keras.Variable):
        return
    if isinstance(value, tf.Variable):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from find(f"{name}_{key}", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from find(f"{name}_{index}", item)
    elif isinstance(value, tf.Module):
        for variable in value.variables:
            yield f"{name}_{variable.name.split(':')[0].replace('/', '_')}", variable
