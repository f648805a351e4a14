"""What `compile`, `register_gradient_hook`, `minimize` and their like refuse."""

import keras
import pytest
import tensorflow as tf
from keras import layers

from keras_tapefit import TapeModel, TapeSequential, hooks

from . import support
from .support import X, Y


@pytest.fixture(scope="module")
def model():
    support.begin()
    model = support.functional()
    model.compile("sgd", "mse")
    return model


@pytest.mark.parametrize(
    ("argument", "value", "error", "match"),
    [
        ("gradient_hooks", hooks.GlobalNormClipping(1.0), TypeError, "must be a list of gradient"),
        ("gradient_hooks", {"a": 1}, TypeError, r"Received: \{'a': 1\} \(of type dict\)"),
        ("gradient_hooks", [3], TypeError, r"must be a `GradientHook` or a function.*Received: 3"),
        (
            "gradient_hooks",
            [hooks.ZeroNonFinite],
            TypeError,
            r"Did you mean `ZeroNonFinite\(\.\.\.\)",
        ),
        ("backward", "sam", TypeError, "`backward` must be one of .*Received: 'sam'"),
        ("micro_batches", 0, ValueError, "must be at least 1. Received: micro_batches=0"),
        ("micro_batches", 2.0, TypeError, "must be an integer. Received: micro_batches=2.0"),
        ("micro_batches", True, TypeError, "must be an integer. Received: micro_batches=True"),
    ],
)
def test_compile_refuses_and_changes_nothing(model, argument, value, error, match):
    handle = model.register_gradient_hook(hooks.GradientMonitor())
    optimizer = model.optimizer
    with pytest.raises(error, match=match):
        model.compile("adam", "mae", **{argument: value})
    assert model.optimizer is optimizer and model.gradient_hooks[0] is handle.hook
    handle.remove()


def test_strategies_that_cannot_train():
    strategy = tf.distribute.MirroredStrategy(
        ["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice()
    )
    with strategy.scope():
        model = support.functional()
        with pytest.raises(ValueError, match="`jit_compile=True` does not work with several"):
            model.compile("sgd", "mse", jit_compile=True)


def test_one_hook_twice(model):
    hook = hooks.GradientMonitor()
    with pytest.raises(ValueError, match="only once"):
        model.compile("sgd", "mse", gradient_hooks=[hook, hook])
    other = support.functional()
    other.register_gradient_hook(hook)
    with pytest.raises(ValueError, match="belongs to another model already"):
        model.compile("sgd", "mse", gradient_hooks=[hook])
    with pytest.raises(ValueError, match="belongs to a model already"):
        model.register_gradient_hook(hook)


def _keep(gradient, variable):
    return gradient


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"hook": 3}, TypeError, "must be a `GradientHook` or a function"),
        ({"hook": hooks.ZeroNonFinite}, TypeError, "Did you mean `ZeroNonFinite"),
        ({"hook": _keep, "targets": 3}, TypeError, "`targets` must be a layer"),
        ({"hook": _keep, "targets": "x/*"}, ValueError, r"(?s)'x/\*' matches no.*first/kernel"),
        ({"hook": _keep, "name": 3}, TypeError, "`name` must be a string. Received: name=3"),
    ],
)
def test_register_refuses(model, arguments, error, match):
    with pytest.raises(error, match=match):
        model.register_gradient_hook(**arguments)
    assert len(model.gradient_hooks) == 0


def test_register_with_targets_in_two_places(model):
    hook = hooks.GradientMonitor(targets="first/*")
    with pytest.raises(ValueError, match="has `targets` of its own. Pass them in one place"):
        model.register_gradient_hook(hook, targets="second/*")


def test_a_name_that_is_taken(model):
    with model.register_gradient_hook(hooks.GradientMonitor(), name="mine"):
        with pytest.raises(ValueError, match="a hook named 'mine' already"):
            model.register_gradient_hook(hooks.GradientMonitor(), name="mine")
    assert len(model.gradient_hooks) == 0


def test_minimize_needs_an_optimizer_and_variables():
    model = TapeModel(name="bare")
    with model.gradient_tape() as tape:
        loss = tf.constant(1.0)
    with pytest.raises(ValueError, match="`minimize` needs an optimizer. Compile the model"):
        tape.minimize(loss)
    with pytest.raises(ValueError, match="`minimize` got no variables to update"):
        tape.minimize(loss, [], keras.optimizers.SGD())


def test_minimize_before_the_with_block(model):
    with pytest.raises(ValueError, match="computed inside `with model.gradient_tape"):
        model.gradient_tape().minimize(tf.constant(1.0))


@pytest.mark.parametrize(
    ("function", "error", "match"),
    [
        (lambda gradients: None, TypeError, "The hook 'bad' .* must return `Gradients`"),
        (
            lambda gradients: gradients.select("first/*"),
            ValueError,
            "without those of.*second/bias",
        ),
        (
            lambda gradients: gradients.map(lambda g: g[:1]),
            ValueError,
            r"gradient of 'first/kernel' must have the variable's shape \(6, 5\)",
        ),
    ],
)
def test_a_hook_that_returns_something_else(model, function, error, match):
    class Bad(hooks.GradientHook):
        def apply(self, gradients):
            return function(gradients)

    with model.register_gradient_hook(Bad()):
        with pytest.raises(error, match=match):
            model.apply_gradients(model.compute_gradients(X, Y))


def test_a_target_that_matches_nothing_once_the_model_is_built():
    model = TapeSequential([layers.Dense(1, name="only")])
    model.compile("sgd", "mse", gradient_hooks=[hooks.ValueClipping(1.0, targets="typo/*")])
    with pytest.raises(ValueError, match=r"(?s)'typo/\*' matches no variable.*only/kernel"):
        support.fit(model)
