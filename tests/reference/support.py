"""What the tests of faults share: data, the same training in parts, a loop written out."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from keras_tapefit import TapeModel

RNG = np.random.default_rng(11)
X = RNG.normal(size=(48, 6)).astype("float32")
Y = RNG.normal(size=(48, 2)).astype("float32")
TOKENS = RNG.integers(0, 5, size=(48, 6)).astype("int32")


@functools.cache
def mirrored(num_replicas: int) -> Any:
    """Returns a strategy on CPU devices, one for the whole process."""
    return tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(num_replicas)],
        cross_device_ops=tf.distribute.ReductionToOneDevice(),
    )


def scope(num_replicas: int | None) -> Any:
    """Returns the scope of a strategy; of none where there is no number."""
    return contextlib.nullcontext() if num_replicas is None else mirrored(num_replicas).scope()


# Ways to train in parts: the arguments of `compile`, the number of steps that are one
# update, and the number of replicas.
PARTS: dict[str, tuple[dict[str, Any], int, int | None]] = {
    "whole": ({}, 1, None),
    "micro-batches": ({"micro_batches": 2}, 1, None),
    "accumulated": ({}, 2, None),
    "replicas": ({}, 1, 2),
}


def train(
    make: Callable[[Any], Any],
    data: dict[str, Any],
    batch_size: int,
    parts: str = "whole",
    kind: Any = TapeModel,
    epochs: int = 2,
    momentum: float = 0.9,
    **options: Any,
) -> tuple[Any, dict[str, list[float]]]:
    """Trains a model with SGD, and returns it and its logs.

    Args:
        make: takes a class of models and makes the model.
        data: the arguments of `fit`.
        batch_size: of an update; steps have a part of it where gradients accumulate.
        parts: a name in `PARTS`.
        kind: `keras.Model` gives what is right.
        epochs: their number.
        momentum: of SGD.
        options: arguments of `compile`.
    """
    of_parts, accumulation, num_replicas = PARTS[parts]
    keras.utils.set_random_seed(5)
    with scope(num_replicas):
        model = make(kind)
        steps = {"gradient_accumulation_steps": accumulation} if accumulation > 1 else {}
        optimizer = keras.optimizers.SGD(0.2, momentum=momentum, **steps)
        model.compile(optimizer, **{"jit_compile": False, **of_parts, **options})
    history = model.fit(
        **data, batch_size=batch_size // accumulation, epochs=epochs, shuffle=False, verbose=0
    )
    return model, history.history


def check_parts(
    make: Callable[[Any], Any], data: dict[str, Any], batch_size: int, parts: str, **options: Any
) -> None:
    """Asserts that a training in parts is the one of `keras.Model` on whole batches."""
    found, logs = train(make, data, batch_size, parts, **options)
    expected, right = train(make, data, batch_size, kind=keras.Model, **options)
    assert_near(found, expected)
    if PARTS[parts][1] == 1:
        # While gradients accumulate, each step logs the loss of its own batch.
        assert_same_logs(logs, right)


def weights(model: Any) -> np.ndarray:
    """Returns all weights in one vector."""
    return np.concatenate([np.ravel(w) for w in model.get_weights()]).astype("float64")


def assert_near(found: Any, expected: Any, tolerance: float = 1e-6) -> None:
    """Asserts that weights are equal to a tolerance, relative to the largest."""
    ours, theirs = (m if isinstance(m, np.ndarray) else weights(m) for m in (found, expected))
    assert np.isfinite(ours).all()
    error = np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max())
    assert error < tolerance, f"weights are off by {error:.1e}"


def assert_same_bits(found: Any, expected: Any) -> None:
    """Asserts that weights and the state of the optimizer are equal to the bit."""
    pairs = list(zip(found.variables, expected.variables, strict=True))
    pairs += zip(found.optimizer.variables, expected.optimizer.variables, strict=True)
    for a, b in pairs:
        np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=b.path)


def assert_same_logs(
    found: dict[str, list[float]], expected: dict[str, list[float]], rtol: float = 1e-5
) -> None:
    """Asserts that all that is logged there is logged here with the same values."""
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=rtol, atol=1e-6, err_msg=name)


class Loop:
    """A training written out: gradients by a plain tape, SGD with momentum in float64.

    Args:
        rate: the learning rate.
        momentum: of SGD.
    """

    def __init__(self, rate: float = 0.2, momentum: float = 0.0) -> None:
        self.rate = rate
        self.momentum = momentum
        self._velocity: dict[int, Any] = {}

    def update(
        self,
        loss: Callable[[], Any],
        variables: Sequence[Any],
        change: Callable[[list[np.ndarray]], list[np.ndarray]] = lambda gradients: gradients,
    ) -> None:
        """Makes one update; what is not in `variables` keeps value and velocity."""
        with tf.GradientTape() as tape:
            value = loss()
        gradients = tape.gradient(value, [v.value for v in variables])
        dense = [np.asarray(tf.convert_to_tensor(g), "float64") for g in gradients]
        for variable, gradient in zip(variables, change(dense), strict=True):
            before = self._velocity.get(id(variable), 0.0)
            velocity = self.momentum * before - self.rate * gradient
            self._velocity[id(variable)] = velocity
            variable.assign(np.asarray(variable.numpy(), "float64") + velocity)


def clip(gradients: list[np.ndarray], max_norm: float) -> list[np.ndarray]:
    """Clips by the global norm, in float64."""
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in gradients))
    return [g * max_norm / max(norm, max_norm) for g in gradients]


def square(y: Any, y_pred: Any) -> Any:
    """The mean square."""
    return tf.reduce_mean(tf.square(tf.cast(y, y_pred.dtype) - y_pred))


def dense(kind: Any = TapeModel) -> Any:
    """A network of two layers, `a` and `b`."""
    inputs = keras.Input((6,), name="x")
    hidden = layers.Dense(5, activation="tanh", name="a")(inputs)
    return kind(inputs, layers.Dense(2, name="b")(hidden))


def fit(model: Any, x: Any = X, y: Any = Y, **options: Any) -> dict[str, list[float]]:
    """Trains without shuffling or printing, and returns the logs."""
    return model.fit(x, y, **{"shuffle": False, "verbose": 0, "batch_size": 8, **options}).history
