"""Functions as hooks, and what hooks may not return."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_tapefit import Gradients, hooks

X, Y = np.array([[3.0, 4.0]]), np.array([[0.0]])


def _seen(model):
    model.set_weights([np.ones((2, 1))])
    model.train_on_batch(X, Y)
    return (1 - model.get_weights()[0]).ravel()


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda gradient, variable: tf.sign(gradient), [1, 1]),
        (lambda gradient, variable: keras.ops.sign(gradient), [1, 1]),
        (lambda gradient, variable: gradient + variable, [43, 57]),
        (lambda gradient, variable: None, [42, 56]),
        (lambda gradient, variable: [[1.0], [2.0]], [1, 2]),
    ],
)
def test_functions(line, fn, expected):
    line.register_gradient_hook(fn)
    np.testing.assert_allclose(_seen(line), expected)
    assert isinstance(line.gradient_hooks[0], hooks.LambdaHook)


def test_functions_see_dense_gradients_and_no_none(bench):
    table = keras.Variable(np.zeros((3, 2)), name="table")
    missing = keras.Variable([0.0], name="missing")
    slices = tf.IndexedSlices(tf.ones((2, 2)), tf.constant([1, 1]), tf.constant([3, 2]))
    seen = []

    def look(gradient, variable):
        seen.append((variable.name, gradient.numpy()))

    result, none = bench(look, [table, missing])(slices, None)
    assert [name for name, _ in seen] == ["table"] and none is None
    np.testing.assert_array_equal(seen[0][1], [[0, 0], [2, 2], [0, 0]])
    np.testing.assert_array_equal(result, seen[0][1])


def test_targets_of_a_function(two_layers):
    seen = []
    two_layers.register_gradient_hook(lambda g, v: seen.append(v.path), targets="*/bias")
    two_layers.train_on_batch(np.ones((2, 4)), np.ones((2, 2)))
    assert set(seen) == {"first/bias", "second/bias"}


def test_what_is_no_function():
    with pytest.raises(
        TypeError, match=r"`fn` must be a function of `\(gradient, variable\)`. Rec"
    ):
        hooks.LambdaHook(3)


def _hook(apply):
    return type("Odd", (hooks.GradientHook,), {"apply": lambda self, g: apply(g)})()


WRONG = {
    "shape from a function": (
        lambda: lambda g, v: g[:1] if v.path == "second/kernel" else None,
        ValueError,
        r"'lambda_hook' must return a gradient of 'second/kernel' of the variable's shape "
        r"\(5, 2\). Received: shape \(1, 2\)",
    ),
    "shape": (
        lambda: _hook(lambda g: g.map(lambda x: x[:1])),
        ValueError,
        r"gradient of 'first/kernel' must have the variable's shape \(4, 5\). Received: .*\(1, 5\)",
    ),
    "dtype": (
        lambda: _hook(lambda g: g.map(lambda x: tf.cast(x, tf.float64))),
        TypeError,
        r"'odd' \(Odd\) must keep the dtype of the gradient of 'first/kernel', float32.*float64",
    ),
    "dtype from a function": (
        lambda: lambda g, v: tf.cast(g, tf.float16),
        TypeError,
        "'lambda_hook' .* must keep the dtype of the gradient of 'first/kernel', float32.*float16",
    ),
    "fewer": (
        lambda: _hook(lambda g: g.select("first/*")),
        ValueError,
        r"must return the gradients of the 4 variables it was given, in their order. Received: 2 "
        r"gradients, without those of \['second/kernel', 'second/bias'\]",
    ),
    "other order": (
        lambda: _hook(lambda g: Gradients(g.pairs()[::-1])),
        ValueError,
        r"must return the gradients of the 4 variables .*in their order. Received: 4 gradients\.",
    ),
    "nothing": (
        lambda: _hook(lambda g: None),
        TypeError,
        r"'odd' \(Odd\) must return `Gradients`, .*Received: None \(of type NoneType\)",
    ),
    "a list": (
        lambda: _hook(lambda g: g.values()),
        TypeError,
        r"(?s)must return `Gradients`, .*\(of type list\)",
    ),
    "no apply": (
        lambda: type("Odd", (hooks.GradientHook,), {})(),
        NotImplementedError,
        r"Odd must implement `apply\(self, gradients\)`",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_hooks_that_return_what_they_must_not(two_layers, kind, run_eagerly):
    make, error, text = WRONG[kind]
    two_layers.compile("sgd", "mse", gradient_hooks=[make()], run_eagerly=run_eagerly)
    with pytest.raises(error, match=text):
        two_layers.train_on_batch(np.ones((2, 4)), np.ones((2, 2)))


def test_a_hook_may_drop_a_gradient(two_layers):
    def drop(gradients):
        pairs = [(None if v.path == "first/kernel" else g, v) for g, v in gradients.pairs()]
        return Gradients(pairs)

    two_layers.compile("sgd", "mse", gradient_hooks=[_hook(drop)])
    before = two_layers.get_weights()
    with pytest.warns(UserWarning, match="Gradients do not exist for variables"):
        two_layers.train_on_batch(np.ones((2, 4)), np.ones((2, 2)))
    after = two_layers.get_weights()
    np.testing.assert_array_equal(before[0], after[0])
    assert not np.array_equal(before[1], after[1])


class Looks(hooks.GradientHook):
    """Says when it is called."""

    def build(self, variables):
        self.calls = []

    def apply(self, gradients):
        self.calls.append("apply")
        return gradients


class After:
    """A class beside `GradientHook` may bring the method."""

    def after_update(self, before, variables):
        self.calls.append(f"after {len(before)} {len(variables)}")


class Watches(After, Looks):
    def on_validation(self, gradients):
        self.calls.append(f"validation {len(gradients)}")


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_methods_are_called_where_a_class_implements_them(two_layers, run_eagerly):
    x, y = np.ones((2, 4)), np.ones((2, 2))
    both, neither = Watches(targets="first/*"), Looks()
    two_layers.compile("sgd", "mse", gradient_hooks=[both, neither], run_eagerly=run_eagerly)
    two_layers.fit(x, y, validation_data=(x, y), verbose=0)
    assert set(both.calls) == {"apply", "after 2 2", "validation 2"}
    assert set(neither.calls) == {"apply"}
    assert two_layers.gradient_hooks.watches_update
    two_layers.gradient_hooks.remove(both)
    assert not two_layers.gradient_hooks.watches_update
    assert not two_layers.gradient_hooks.watches_validation


def test_what_is_asked_for_decides_where_a_class_says_so(two_layers):
    monitors = [hooks.GradientMonitor(), hooks.GradientMonitor(validation=True, name="all")]
    assert [monitor.watches_validation for monitor in monitors] == [False, True]
    logs = two_layers.fit(np.ones((2, 4)), np.ones((2, 2)), validation_split=0.5, verbose=0).history
    assert "val_loss" in logs and not any("norm" in name for name in logs)
    two_layers.gradient_hooks = monitors
    x, y = np.ones((2, 4)), np.ones((2, 2))
    logs = two_layers.fit(x, y, validation_data=(x, y), verbose=0).history
    assert "val_all_norm" in logs and "val_gradient_norm" not in logs
