"""Branches of the update: as functions where all is on one CPU, and taken apart elsewhere."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_tapefit import TapeSequential, hooks
from keras_tapefit.update import replicas

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


def is_taken_apart(model):
    """Whether TensorFlow is told to take the branch of the update apart."""
    step = tf.function(lambda x, y: model.train_step((x, y))).get_concrete_function(X, Y)
    library = step.graph.as_graph_def().library.function
    nodes = [*step.graph.as_graph_def().node, *(n for f in library for n in f.node_def)]
    branch = max((n for n in nodes if n.op == "If"), key=lambda node: len(node.input))
    return branch.attr["_lower_using_switch_merge"].b


@pytest.mark.parametrize("options", [{}, {"jit_compile": True}], ids=["graph", "XLA"])
def test_both_kinds_of_branches_do_the_same(options, monkeypatch):
    functions, model = trained(**options)
    assert int(model.optimizer.iterations) == 2
    monkeypatch.setattr(replicas, "on_one_cpu", lambda _: False)
    taken_apart, _ = trained(**options)
    for a, b in zip(functions, taken_apart, strict=True):
        np.testing.assert_array_equal(a, b)


def test_eager_mode_has_neither():
    eager, _ = trained(run_eagerly=True)
    for a, b in zip(eager, trained()[0], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_which_kind_it_is(monkeypatch):
    assert not is_taken_apart(trained()[1])
    monkeypatch.setattr(replicas, "on_one_cpu", lambda _: False)
    assert is_taken_apart(trained()[1])


def test_variables_on_several_devices():
    first, second = (keras.Variable(1.0) for _ in range(2))
    with tf.device("CPU:1"):
        elsewhere = keras.Variable(1.0)
    assert replicas.on_one_cpu([first, second, tf.Variable(1.0)])
    assert not replicas.on_one_cpu([first, elsewhere])
    with tf.distribute.OneDeviceStrategy("CPU:0").scope():
        assert not replicas.on_one_cpu([first, second])


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
