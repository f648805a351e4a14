"""Models trained in every mode of `fit`, and by hand: what tests of backward share."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

BATCH = 8
NUM_STEPS = 4

MODES = {
    "graph": {},
    "eager": {"run_eagerly": True},
    "xla": {"jit_compile": True},
    "steps_per_execution": {"steps_per_execution": 2},
    "loss_scale": {},
    "replicas": {},
}


def _strategy(mode: str) -> tf.distribute.Strategy:
    if mode != "replicas":
        return tf.distribute.get_strategy()
    return tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )


def trained(
    mode: str, make: Callable[[], Any], x: Any, y: Any, loss: Any = "mse", **kwargs: Any
) -> Any:
    """Trains a model in a mode of `fit`, on batches in a fixed order."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(11)
    with _strategy(mode).scope():
        model = make()
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
        if mode == "loss_scale":
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=1024.0)
        arguments = {"jit_compile": False, **MODES[mode], **kwargs}
        model.compile(optimizer, loss, **arguments)
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH)
    model.history_of_fit = model.fit(batches, shuffle=False, verbose=0).history
    return model


def by_hand(make: Callable[[], Any], gradients: Callable[..., Any], x: Any, y: Any) -> Any:
    """Trains a model with gradients that a function computes, and stock Keras."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(11)
    model = make()
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9)
    for i in range(0, BATCH * NUM_STEPS, BATCH):
        batch = keras.tree.map_structure(lambda v: tf.constant(v[i : i + BATCH]), (x, y))  # noqa: B023
        optimizer.apply(gradients(model, *batch, i // BATCH), model.trainable_variables)
    return model


def assert_same_weights(model: Any, expected: Any, atol: float = 2e-6) -> None:
    for variable, truth in zip(model.weights, expected.weights, strict=True):
        np.testing.assert_allclose(
            variable.numpy(), truth.numpy(), atol=atol, rtol=2e-5, err_msg=variable.path
        )
