"""`compute_gradients` and `apply_gradients`, outside of `fit`."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_tapefit import Gradients, TapeModel, TapeSequential, hooks

from . import support
from .support import X, Y


@pytest.fixture
def model():
    support.begin()
    model = support.functional()
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", metrics=["mae"])
    support.fit(model)
    return model


def _by_hand(model, x, y, sample_weight=None):
    with tf.GradientTape() as tape:
        y_pred = model(x, training=True)
        loss = model.compute_loss(x, y, y_pred, sample_weight)
    return tape.gradient(loss, model.trainable_variables)


def test_the_gradients_are_those_of_a_tape(model):
    state = support.state_of(model)
    gradients = model.compute_gradients(X[:5], Y[:5])
    found = support.values(gradients.values())
    assert [str(path) for path in gradients] == [v.path for v in model.trainable_variables]
    # The same seed again, because the state is what it was.
    support.assert_same(support.state_of(model), state)
    support.assert_same(found, support.values(_by_hand(model, X[:5], Y[:5])))


def test_nothing_is_changed_to_the_bit(model):
    """BatchNormalization, dropout's seed, metrics, optimizer and hooks stay."""
    model.gradient_hooks = [hooks.PercentileClipping(), hooks.GradientMonitor()]
    support.fit(model)
    state = support.state_of(model)
    of_hooks = support.values(model.gradient_hooks[0].variables)
    first = support.values(model.compute_gradients(X, Y).values())
    second = support.values(model.compute_gradients(X, Y).values())
    support.assert_same(second, first)
    support.assert_same(support.state_of(model), state)
    support.assert_same(support.values(model.gradient_hooks[0].variables), of_hooks)
    # All of which a step does change.
    model.train_on_batch(X, Y)
    after = support.state_of(model)
    assert support.differ(after["metrics"], state["metrics"])
    moved = [
        v.path
        for v, before, value in zip(
            model.variables, state["weights"], after["weights"], strict=True
        )
        if not np.array_equal(before, value)
    ]
    assert any("seed" in path for path in moved) and "norm/moving_mean" in moved


def test_hooks_do_not_take_part(model):
    expected = support.values(model.compute_gradients(X, Y).values())
    model.register_gradient_hook(lambda g, v: tf.zeros_like(g))
    support.assert_same(support.values(model.compute_gradients(X, Y).values()), expected)


def test_sample_weights_and_frozen_variables(model):
    weights = np.linspace(0.1, 2.0, 10, dtype="float32")
    model.freeze("first/*")
    gradients = model.compute_gradients(X, Y, weights)
    assert "first/kernel" not in gradients and len(gradients) == 4
    found = support.values(gradients.values())
    support.assert_same(found, support.values(_by_hand(model, X, Y, weights)))


def test_on_a_model_that_is_not_built():
    support.begin()
    model = TapeSequential([layers.Dense(1, kernel_initializer="ones")])
    model.compile("sgd", "mse")
    gradients = model.compute_gradients(np.array([[3.0, 4.0]]), np.array([[0.0]]))
    np.testing.assert_array_equal(gradients["dense/kernel"], [[42.0], [56.0]])


def test_loss_scale_is_taken_out():
    support.begin()
    model = TapeSequential([keras.Input((2,)), layers.Dense(1, kernel_initializer="ones")])
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(), initial_scale=1024.0)
    model.compile(optimizer, "mse")
    gradients = model.compute_gradients(np.array([[3.0, 4.0]]), np.array([[0.0]]))
    np.testing.assert_array_equal(gradients["dense/kernel"], [[42.0], [56.0]])


@pytest.mark.parametrize("kind", ["Gradients", "pairs"])
def test_apply_gradients_is_the_optimizer(model, kind):
    gradients = model.compute_gradients(X, Y)
    given = gradients if kind == "Gradients" else gradients.pairs()
    before = support.values(model.variables)
    slots = support.values(model.optimizer.variables)
    model.apply_gradients(given)
    found = support.state_of(model)

    for variable, value in zip(model.variables, before, strict=True):
        variable.assign(value)
    for variable, value in zip(model.optimizer.variables, slots, strict=True):
        variable.assign(value)
    model.optimizer.apply(gradients.values(), gradients.variables)
    support.assert_same(found, support.state_of(model))


def test_apply_gradients_goes_through_hooks_and_gate(model):
    model.gradient_hooks = [hooks.SkipNonFinite(), lambda g, v: 0.5 * g]
    gradients = model.compute_gradients(X, Y)
    state = support.state_of(model)
    model.apply_gradients(gradients.scale(float("nan")))
    support.assert_same(support.state_of(model), state)

    model.apply_gradients(gradients)
    found = support.values(model.trainable_variables)
    for variable, value in zip(model.variables, state["weights"], strict=True):
        variable.assign(value)
    for variable, value in zip(model.optimizer.variables, state["optimizer"], strict=True):
        variable.assign(value)
    model.optimizer.apply(gradients.scale(0.5).values(), gradients.variables)
    support.assert_same(found, support.values(model.trainable_variables))


def test_some_variables_only(model):
    before = {v.path: v.numpy() for v in model.variables}
    gradients = model.compute_gradients(X, Y).select("second/*")
    assert isinstance(gradients, Gradients)
    model.apply_gradients(gradients)
    moved = {v.path for v in model.variables if not np.array_equal(v.numpy(), before[v.path])}
    assert moved == {"second/kernel", "second/bias"}


def test_what_they_need():
    model = TapeModel(name="bare")
    with pytest.raises(ValueError, match=r"compile\(\)"):
        model.compute_gradients(X, Y)
    with pytest.raises(ValueError, match="`apply_gradients` needs an optimizer. Compile"):
        model.apply_gradients([])
