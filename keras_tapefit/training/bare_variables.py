"""Bare `tf.Variable` attributes of a model, in the style of TensorFlow's own guides.

Those that TensorFlow would train are adopted as weights: floating-point ones made without
`trainable=False`. Counters, queues, tables and constants are left alone, as Keras leaves
them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf


class AdoptedVariable(keras.Variable):
    """A Keras variable whose value is a `tf.Variable` that somebody made.

    Args:
        variable: the `tf.Variable`.
        name: the attribute that holds it.
    """

    is_bare = True

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


class BareVariables(keras.Operation):
    """The adopted variables of a model: which attribute holds them, and their values saved.

    They are saved next to the model's weights, not among them, so that weight files are
    those of the same model on `keras.Model`, in both directions.
    """

    def __init__(self) -> None:
        super().__init__(name="tapefit_variables")
        self.adopted: list[AdoptedVariable] = []
        self._found: dict[str, list[tf.Variable]] = {}

    def call(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("Bare variables are saved, not called.")

    def follow(self, name: str, found: list[tuple[str, tf.Variable]]) -> list[AdoptedVariable]:
        """Notes what an attribute holds now.

        Returns:
            The adopted variables that no attribute holds now.
        """
        self._found[name] = [variable for _, variable in found]
        held = {id(variable) for variables in self._found.values() for variable in variables}
        released = [v for v in self.adopted if id(v.value) not in held]
        self.adopted = [v for v in self.adopted if id(v.value) in held]
        return released

    def save_own_variables(self, store: Any) -> None:
        for key, variable in self._by_name().items():
            store[key] = np.asarray(variable)

    def load_own_variables(self, store: Any) -> None:
        # A file of plain Keras has none of them.
        names = set(store.keys())
        for key, variable in self._by_name().items():
            if key in names:
                variable.assign(store[key])

    def _by_name(self) -> dict[str, AdoptedVariable]:
        found: dict[str, AdoptedVariable] = {}
        for variable in self.adopted:
            key = variable.name
            while key in found:
                # The attribute `a_0` and the first of the list `a`.
                key += "_"
            found[key] = variable
        return found


def find(name: str, value: Any) -> Iterator[tuple[str, tf.Variable]]:
    """Yields the variables to train in an attribute's value, with a name for each."""
    if isinstance(value, keras.Variable):
        return
    if isinstance(value, tf.Variable):
        if value.trainable and value.dtype.is_floating:
            yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from find(f"{name}_{key}", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from find(f"{name}_{index}", item)
    elif isinstance(value, tf.Module):
        for variable in value.trainable_variables:
            path = variable.name.split(":")[0].replace("/", "_")
            yield from find(f"{name}_{path}", variable)
