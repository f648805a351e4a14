"""What the tests of callbacks share: a small network, and its training in NumPy.

`expected` is the truth for the records: forward and backward pass, gate, clipping and
SGD written out in float64, without TensorFlow.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from keras_tapefit import TapeModel, hooks

BATCH_SIZE = 12
EPOCHS = 3
STEPS_PER_EPOCH = 4
MAX_NORM = 0.7
MOMENTUM = 0.9
PATHS = ("hidden/kernel", "hidden/bias", "end/kernel", "end/bias")
SHAPES = {"hidden/kernel": (6, 5), "hidden/bias": (5,), "end/kernel": (5, 2), "end/bias": (2,)}

_RNG = np.random.default_rng(31)
X = _RNG.normal(size=(BATCH_SIZE * STEPS_PER_EPOCH, 6)).astype("float32")
Y = _RNG.normal(size=(len(X), 2)).astype("float32")
# The second batch of every epoch is to be skipped; of two replicas the second one has it.
BAD_STEP = 1
BAD_Y = Y.copy()
BAD_Y[BATCH_SIZE + 9] = np.nan

Arrays = dict[str, np.ndarray]


@functools.cache
def mirrored(num_replicas: int) -> tf.distribute.Strategy:
    """Returns a strategy on CPU devices, one for the whole process."""
    return tf.distribute.MirroredStrategy(
        [f"CPU:{i}" for i in range(num_replicas)],
        cross_device_ops=tf.distribute.ReductionToOneDevice(),
    )


def rate_at(step: int) -> float:
    """The learning rate after `step` updates."""
    return 0.2 * 0.5 ** (step / 4)


def network(num_replicas: int = 1, **options: Any) -> TapeModel:
    """Returns a compiled network of two layers, the same each time.

    Args:
        num_replicas: of a `MirroredStrategy`.
        options: for `compile`.
    """
    keras.utils.clear_session()
    keras.utils.set_random_seed(5)
    scope = mirrored(num_replicas).scope() if num_replicas > 1 else contextlib.nullcontext()
    with scope:
        inputs = keras.Input((6,))
        hidden = layers.Dense(5, activation="tanh", name="hidden")(inputs)
        model = TapeModel(inputs, layers.Dense(2, name="end")(hidden))
        schedule = keras.optimizers.schedules.ExponentialDecay(0.2, 4, 0.5)
        options = {"optimizer": keras.optimizers.SGD(schedule, MOMENTUM), "loss": "mse", **options}
        if num_replicas == 1:
            options = {"jit_compile": False, **options}
        model.compile(**options)
    return model


def hook_list() -> list[hooks.GradientHook]:
    """Returns the hooks that `expected` has with `bad_batches` and `hold_back`."""
    return [
        hooks.Freezing("end/bias", epochs=1),
        hooks.SkipNonFinite(),
        hooks.GlobalNormClipping(MAX_NORM),
    ]


def fit(model: Any, callbacks: Sequence[Any], y: np.ndarray = Y, **options: Any) -> Any:
    """Trains on batches in a fixed order."""
    options = {"batch_size": BATCH_SIZE, "shuffle": False, "verbose": 0, **options}
    return model.fit(options.pop("x", X), y, callbacks=list(callbacks), **options)


def weights_of(model: Any) -> Arrays:
    return {v.path: v.numpy().astype("float64") for v in model.trainable_variables}


def gradients_of(weights: Arrays, x: np.ndarray, y: np.ndarray) -> tuple[float, Arrays]:
    """Returns the mean squared error of a batch, and its gradients."""
    x, y = x.astype("float64"), y.astype("float64")
    hidden = np.tanh(x @ weights["hidden/kernel"] + weights["hidden/bias"])
    error = hidden @ weights["end/kernel"] + weights["end/bias"] - y
    of_outputs = 2.0 * error / error.size
    of_hidden = (of_outputs @ weights["end/kernel"].T) * (1.0 - hidden**2)
    return float(np.mean(error**2)), {
        "hidden/kernel": x.T @ of_hidden,
        "hidden/bias": of_hidden.sum(axis=0),
        "end/kernel": hidden.T @ of_outputs,
        "end/bias": of_outputs.sum(axis=0),
    }


def joint(arrays: Any) -> float:
    """The norm of several arrays together."""
    return float(np.sqrt(sum(float(np.sum(np.square(a))) for a in arrays)))


def expected(
    weights: Arrays,
    y: np.ndarray = Y,
    x: np.ndarray = X,
    epochs: int = EPOCHS,
    batch_size: int = BATCH_SIZE,
    max_norm: float | None = MAX_NORM,
    held_back: str | None = "end/bias",
) -> Arrays:
    """Returns the records that a training is to leave.

    Args:
        weights: at the beginning, by path.
        max_norm: of the clipping; `None`: no hooks at all.
        held_back: the variable that is frozen in the first epoch.
    """
    weights, velocity = dict(weights), {path: 0.0 * w for path, w in weights.items()}
    rows: list[dict[str, float]] = []
    num_updates = 0
    for epoch in range(epochs):
        for begin in range(0, len(x), batch_size):
            batch = slice(begin, begin + batch_size)
            loss, gradients = gradients_of(weights, x[batch], y[batch])
            if epoch == 0 and held_back is not None:
                del gradients[held_back]
            before = joint(gradients.values())
            skipped = max_norm is not None and not np.isfinite(before)
            factor = 1.0 if max_norm is None or before <= max_norm else max_norm / before
            rate = rate_at(num_updates)
            old = dict(weights)
            if not skipped:
                num_updates += 1
                for path, gradient in gradients.items():
                    velocity[path] = MOMENTUM * velocity[path] - rate * factor * gradient
                    weights[path] = weights[path] + velocity[path]
            change = {path: weights[path] - old[path] for path in gradients}
            row = {
                "step": len(rows),
                "epoch": epoch,
                "loss": loss,
                "learning_rate": rate,
                "gradient_norm": before,
                "gradient_norm_after": factor * before,
                "skipped": float(skipped),
                "update_ratio": joint(change.values()) / joint(old[p] for p in gradients),
            }
            for path in PATHS:
                there = path in gradients
                norm = joint([gradients[path]]) if there else np.nan
                size = joint([old[path]])
                ratio = joint([change[path]]) / size if there and size else 0.0
                row[f"gradient_norm/{path}"] = norm
                row[f"gradient_norm_after/{path}"] = factor * norm
                row[f"update_ratio/{path}"] = ratio if there else np.nan
                for place in np.ndindex(*SHAPES[path]):
                    row[f"weight/{path}[{','.join(map(str, place))}]"] = weights[path][place]
            rows.append(row)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}
