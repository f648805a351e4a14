"""Embeddings with repeated tokens: what a lookup as a product with one-hot rows gives."""

import functools
import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_tapefit import TapeModel, hooks

from . import support
from .support import TOKENS, Y, difference, trained

RATES = {"SGD": 0.1, "Adadelta": 1.0, "Ftrl": 0.5}
OPTIMIZERS = {
    name: value
    for name, value in vars(keras.optimizers).items()
    if inspect.isclass(value)
    and issubclass(value, keras.optimizers.Optimizer)
    and name not in ("Optimizer", "LossScaleOptimizer", "MultiOptimizer")
}


class OneHot(layers.Layer):
    """An embedding without a lookup: its gradient is dense."""

    def build(self, shape):
        self.embeddings = self.add_weight((5, 3), initializer="uniform", name="embeddings")

    def call(self, x):
        return keras.ops.one_hot(x, 5) @ self.embeddings


def _make(table, model_class):
    inputs = keras.Input((4,), dtype="int32", name="x")
    flat = layers.Flatten()(table(inputs))
    hidden = layers.Dense(5, activation="tanh", name="hidden")(flat)
    return model_class(inputs, layers.Dense(2, name="end")(hidden))


def _lookup(model_class=TapeModel):
    return _make(layers.Embedding(5, 3, name="table"), model_class)


def _product(model_class=keras.Model):
    return _make(OneHot(name="table"), model_class)


support.MODELS["lookup"] = (_lookup, TOKENS)
support.MODELS["product"] = (_product, TOKENS)


def _optimizer(name, **options):
    return lambda: OPTIMIZERS[name](learning_rate=RATES.get(name, 0.05), **options)


@functools.cache
def _dense(name):
    """Plain Keras, with dense gradients.

    Eager, since in a graph its `ScheduleFreeAdamW` starts from zeros, and not from the
    weights.
    """
    return trained("product", _optimizer(name), model_class=keras.Model, run_eagerly=True)


EVERYDAY = [("graph", "Adam"), ("graph", "Adagrad"), ("mirrored", "Adam")]


@pytest.mark.parametrize(
    ("mode", "optimizer"), support.cells(OPTIMIZERS, EVERYDAY, "Adam", ["graph"])
)
def test_a_lookup_is_a_product(mode, optimizer):
    """Keras's own optimizers square the slices of a row one by one."""
    options, num_replicas = support.MODES[mode]
    same = [lambda g, v: None]
    found = trained("lookup", _optimizer(optimizer), num_replicas, gradient_hooks=same, **options)
    assert difference(found, _dense(optimizer)) < 1e-6


def test_all_optimizers_are_here():
    assert {"SGD", "Adam", "Lamb", "Muon", "Adafactor", "Ftrl"} <= OPTIMIZERS.keys()
    assert len(OPTIMIZERS) >= 13


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_without_hooks_it_is_as_keras_has_it(optimizer):
    """To the bit, and so not what the product gives where gradients are squared."""
    stock, ours = (
        trained("lookup", _optimizer(optimizer), model_class=kind)
        for kind in (keras.Model, TapeModel)
    )
    support.assert_same_bits(ours, stock)
    assert (difference(ours, _dense(optimizer)) < 1e-6) == (optimizer == "SGD")


def _dense_gradients():
    """Of the first batch, by plain TensorFlow."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(5)
    model = _product()
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((model(TOKENS[:12]) - Y[:12]) ** 2)
    gradients = tape.gradient(loss, model.trainable_variables)
    return {
        v.path: g.numpy().astype("float64")
        for v, g in zip(model.trainable_variables, gradients, strict=True)
    }


@pytest.mark.parametrize("mode", support.modes("mirrored"))
def test_norms_are_those_of_the_dense_gradient(mode):
    options, num_replicas = support.MODES[mode]
    found = trained(
        "lookup",
        _optimizer("SGD"),
        num_replicas,
        num_examples=12,
        gradient_hooks=[hooks.GradientMonitor(per_variable=True)],
        **options,
    )
    expected = _dense_gradients()
    total = np.sqrt(sum(np.sum(g**2) for g in expected.values()))
    np.testing.assert_allclose(found.log["gradient_norm"], [total], rtol=1e-6)
    table = expected["table/embeddings"]
    (entry,) = (v for k, v in found.log.items() if "table/embeddings" in k)
    np.testing.assert_allclose(entry, [np.linalg.norm(table)], rtol=1e-6)


def _clip_rows(g, v):
    return tf.clip_by_value(g, -0.01, 0.01)


CLIPS = {
    "value": lambda: hooks.ValueClipping(0.01),
    "norm": lambda: hooks.NormClipping(0.05),
    "global": lambda: hooks.GlobalNormClipping(0.1),
    "block": lambda: hooks.BlockRMSClipping(0.01),
    "noise": lambda: hooks.GradientNoise(0.05, seed=3),
    "function": lambda: _clip_rows,
}


@pytest.mark.parametrize(
    ("mode", "clip"),
    support.cells(CLIPS, [("graph", "value"), ("graph", "function")], "norm", ["graph"]),
)
def test_hooks_see_the_sum_of_the_slices(mode, clip):
    """The same hook on dense gradients does the same."""
    options, num_replicas = support.MODES[mode]
    found = trained(
        "lookup", _optimizer("SGD"), num_replicas, gradient_hooks=[CLIPS[clip]()], **options
    )
    expected = trained(
        "product", _optimizer("SGD"), model_class=TapeModel, gradient_hooks=[CLIPS[clip]()]
    )
    plain = _dense("SGD")
    assert difference(found, expected) < 1e-6 < difference(found, plain)


class Spy(keras.optimizers.SGD):
    """Notes what kind of gradient the table gets."""

    kinds: list = []

    def update_step(self, gradient, variable, learning_rate):
        if tuple(variable.shape) == (5, 3):  # the table
            self.kinds.append(type(gradient))
        super().update_step(gradient, variable, learning_rate)


@pytest.mark.parametrize(
    "optimizer", [Spy, lambda r: support.scaled(Spy(r))], ids=["plain", "scaled"]
)
@pytest.mark.parametrize("mode", ["graph", pytest.param("mirrored", marks=pytest.mark.slow)])
def test_gradients_stay_sparse(mode, optimizer):
    """Through replicas, loss scale, gate and hooks that work by row."""
    options, num_replicas = support.MODES[mode]
    Spy.kinds = []
    chosen = [
        hooks.SkipNonFinite(),
        hooks.GradientMonitor(),
        hooks.GlobalNormClipping(0.5),
        hooks.ValueClipping(0.1),
    ]
    trained("lookup", lambda: optimizer(0.1), num_replicas, gradient_hooks=chosen, **options)
    assert set(Spy.kinds) == {tf.IndexedSlices}


@pytest.mark.parametrize("mode", ["graph", pytest.param("mirrored", marks=pytest.mark.slow)])
def test_an_accumulated_window(mode):
    """The sums of a window are dense."""
    options, num_replicas = support.MODES[mode]
    found = trained(
        "lookup",
        _optimizer("Adam", gradient_accumulation_steps=3),
        num_replicas,
        batch_size=4,
        gradient_hooks=[lambda g, v: None],
        **options,
    )
    assert difference(found, _dense("Adam")) < 1e-6
