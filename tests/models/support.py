"""What the tests of models share: twins of one model, and equality to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import layers

from keras_tapefit import TapeModel, TapeSequential


@dataclass(frozen=True)
class Kit:
    """The two names that a user's import line binds."""

    Model: Any
    Sequential: Any


STOCK = Kit(keras.Model, keras.Sequential)
OURS = Kit(TapeModel, TapeSequential)

RNG = np.random.default_rng(23)
X = RNG.normal(size=(10, 6)).astype("float32")
Y = RNG.normal(size=(10, 1)).astype("float32")
LABELS = RNG.integers(0, 3, size=10)
BATCH_SIZE = 4


def begin() -> None:
    """Makes what follows depend on nothing that was before."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(5)


def functional(kit: Kit = OURS) -> Any:
    """A small functional model with BatchNormalization and dropout, and names."""
    inputs = keras.Input((6,))
    hidden = layers.Dense(5, activation="relu", name="first")(inputs)
    hidden = layers.BatchNormalization(name="norm")(hidden)
    hidden = layers.Dropout(0.3)(hidden)
    return kit.Model(inputs, layers.Dense(1, name="second")(hidden))


def fit(model: Any, x: Any = X, y: Any = Y, **options: Any) -> dict[str, list[float]]:
    """Trains in silence and returns the history."""
    options = {"batch_size": BATCH_SIZE, "verbose": 0, **options}
    return model.fit(x, y, **options).history


def state_of(model: Any) -> dict[str, Any]:
    """Returns all that training changes: weights, optimizer, metrics."""
    optimizer = getattr(model, "optimizer", None)
    return {
        "weights": values(model.variables),
        "optimizer": values(optimizer.variables) if optimizer is not None else [],
        "metrics": values(model.metrics_variables),
    }


def values(variables: Any) -> list[np.ndarray]:
    return [np.array(keras.ops.convert_to_numpy(v)) for v in variables]


def assert_same(found: Any, expected: Any) -> None:
    """Asserts that two structures of arrays are equal to the bit."""
    keras.tree.assert_same_structure(found, expected)
    flat = zip(
        keras.tree.flatten_with_path(found), keras.tree.flatten_with_path(expected), strict=True
    )
    for (path, value), (_, truth) in flat:
        value, truth = np.asarray(value), np.asarray(truth)
        assert value.dtype == truth.dtype, path
        np.testing.assert_array_equal(value, truth, err_msg=str(path), strict=True)


def differ(found: Any, expected: Any) -> bool:
    """Whether two structures of arrays of one form differ anywhere."""
    pairs = zip(keras.tree.flatten(found), keras.tree.flatten(expected), strict=True)
    return any(not np.array_equal(a, b) for a, b in pairs)


def custom_objects(*classes: type) -> Callable[[], Any]:
    return keras.saving.custom_object_scope({cls.__name__: cls for cls in classes})
