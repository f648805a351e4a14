"""The branch around an update that a gate may reject."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_tapefit import TapeSequential, hooks

X = np.random.default_rng(3).normal(size=(24, 4)).astype("float32")
Y = np.where(np.arange(24)[:, None] // 8 == 1, np.nan, X[:, :1])


def trained(**options):
    """Three steps, the second of which is skipped; dense and sparse gradients."""
    keras.utils.set_random_seed(2)
    model = TapeSequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(1)])
    optimizer = keras.optimizers.AdamW(0.1, use_ema=True, ema_overwrite_frequency=2)
    model.compile(optimizer, "mse", gradient_hooks=[hooks.SkipNonFinite()], **options)
    model.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    return [v.numpy() for v in [*model.weights, *model.optimizer.variables]], model


@pytest.mark.parametrize("options", [{"run_eagerly": True}, {"jit_compile": True}])
def test_all_modes_skip_the_step(options):
    """A branch in a graph, none in eager mode, a selection in a program of XLA."""
    graph, model = trained()
    assert int(model.optimizer.iterations) == 2
    for a, b in zip(trained(**options)[0], graph, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_layers_on_several_devices_train():
    """A function may use what is on its own device only."""

    def build():
        keras.utils.set_random_seed(2)
        model = TapeSequential([keras.Input((4,))])
        for device in ("CPU:0", "CPU:1"):
            with tf.device(device):
                model.add(keras.layers.Dense(2))
        model.compile("adam", "mse", gradient_hooks=[hooks.SkipNonFinite()])
        return model

    model = build()
    assert len({w.value.device for w in model.weights}) == 2
    before = model.get_weights()
    model.fit(X, X[:, :2], batch_size=8, verbose=0)
    assert all((a != b).any() for a, b in zip(before, model.get_weights(), strict=True))
