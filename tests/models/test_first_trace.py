"""Losses and metrics made before the first step: the logs of stock, from one trace."""

import collections

import keras
import numpy as np
import pytest
from keras import layers

from keras_tapefit import TapeModel, TapeSequential, hooks, tuning

RNG = np.random.default_rng(0)
X = RNG.standard_normal((12, 3)).astype("float32")
A, B = (RNG.uniform(size=(12, 1)).astype("float32") for _ in range(2))
Pair = collections.namedtuple("Pair", "first second")


def compiled(cls, arrange, loss, metrics=None, **arguments):
    """A functional model whose outputs are arranged in some way."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    a = layers.Dense(1, activation="sigmoid", name="a")(inputs)
    b = layers.Dense(1, activation="sigmoid", name="b")(a)
    model = cls(inputs, arrange(a, b))
    model.compile("sgd", loss, metrics=metrics, jit_compile=False, **arguments)
    return model


def assert_same_logs(found, expected, rtol=1e-5):
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        np.testing.assert_allclose(found[key], values, rtol=rtol, err_msg=key)


def one(a, b):
    return a


def alone(a, b):
    return [a]


def in_list(a, b):
    return [a, b]


def in_tuple(a, b):
    return (a, b)


def in_dict(a, b):
    return {"b": b, "a": a}


def nested(a, b):
    return {"x": (a, b), "y": [b]}


def whole(y_true, y_pred):
    """A loss of all outputs together."""
    pairs = zip(keras.tree.flatten(y_true), keras.tree.flatten(y_pred), strict=True)
    return sum(keras.losses.mean_absolute_error(*pair) for pair in pairs)


CASES = {
    "one": (one, A, "mse", ["mae"]),
    "one in a list": (alone, A, "mse", ["mae"]),
    "one in a list, targets too": (alone, [A], ["mse"], [["mae"]]),
    "list": (in_list, [A, B], ["mse", "mae"], [["mae"], ["mse"]]),
    "list, targets in a tuple": (in_list, (A, B), "mse", None),
    "list, a loss by name": (in_list, [A, B], {"a": "mse", "b": "mae"}, {"b": ["mse"]}),
    "list, targets by name": (in_list, {"a": A, "b": B}, {"a": "mse", "b": "mae"}, None),
    "list, one loss missing": (in_list, [A, B], [None, "mse"], None),
    "tuple, targets in a list": (in_tuple, [A, B], ["mse", "mae"], None),
    "tuple, losses of all and of each": (in_list, [A, B], (whole, ["mse", "mae"]), None),
    "named tuple": (Pair, Pair(A, B), ["mse", "mae"], None),
    "dict": (in_dict, {"a": A, "b": B}, {"a": "mse", "b": "mae"}, {"a": ["mae"]}),
    "dict, one loss": (in_dict, {"a": A, "b": B}, {"b": "mae"}, None),
    "nested": (nested, {"x": (A, B), "y": [B]}, {"x": ("mse", "mae"), "y": ["mse"]}, None),
}


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_logs_are_those_of_stock(name, micro_batches):
    arrange, y, loss, metrics = CASES[name]
    expected = compiled(keras.Model, arrange, loss, metrics).fit(X, y, 12, verbose=0, epochs=2)
    given = {"gradient_hooks": [hooks.SkipNonFinite()], "micro_batches": micro_batches}
    found = compiled(TapeModel, arrange, loss, metrics, **given).fit(X, y, 12, verbose=0, epochs=2)
    found.history.pop("skipped_steps", None)
    assert_same_logs(found.history, expected.history)


class Seen(layers.Layer):
    """A layer that counts how often Python runs its `call`."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def call(self, x):
        self.calls += 1
        return x


@pytest.mark.parametrize("y", [A, [A, B]], ids=["one output", "two outputs"])
def test_the_step_is_traced_once(y):
    seen, inputs = Seen(), keras.Input((3,))
    hidden = seen(inputs)
    outputs = [layers.Dense(1)(hidden) for _ in range(2 if isinstance(y, list) else 1)]
    model = TapeModel(inputs, outputs)
    model.compile("sgd", "mse", metrics=[["mae"]] * len(outputs), jit_compile=False)
    before = seen.calls
    model.fit(X, y, verbose=0)
    assert seen.calls == before + 1


def test_so_is_that_of_a_sequential_model():
    seen = Seen()
    model = TapeSequential([keras.Input((3,)), seen, layers.Dense(1)])
    model.compile("sgd", "mse", metrics=["mae"], jit_compile=False)
    before = seen.calls
    model.fit(X, A, verbose=0)
    assert seen.calls == before + 1


class Twice:
    """The way of `compute_loss` with one output and two targets."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return super().compute_loss(x, y, [y_pred, y_pred], sample_weight, training)


class OurTwice(Twice, TapeModel):
    pass


class StockTwice(Twice, keras.Model):
    pass


def twice(cls, **arguments):
    return compiled(cls, one, ["mse", "mae"], **arguments)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_loss_that_sees_something_else_than_the_outputs(micro_batches):
    expected = twice(StockTwice).fit(X, (A, B), 12, verbose=0, epochs=2).history
    found = twice(OurTwice, micro_batches=micro_batches).fit(X, (A, B), 12, verbose=0, epochs=2)
    assert_same_logs(found.history, expected)


def test_such_a_loss_in_an_epoch_that_is_continued(tmp_path):
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 1:
                raise KeyboardInterrupt

    def fit(*callbacks, **arguments):
        arguments = {"batch_size": 4, "shuffle": False, "verbose": 0, **arguments}
        return twice(OurTwice).fit(X, (A, B), callbacks=list(callbacks), **arguments).history

    def backup():
        return keras.callbacks.BackupAndRestore(tmp_path, save_freq=1)

    with pytest.raises(KeyboardInterrupt):
        fit(backup(), Stop())
    expected, found = fit(), fit(backup())
    assert_same_logs(found, expected, rtol=1e-6)


def test_such_a_loss_in_traces_that_are_reused():
    pool = tuning.TapeHyperModel(lambda hp: twice(OurTwice), reuse=True)
    for _ in range(2):
        found = pool.build(None).fit(X, (A, B), verbose=0).history
    expected = twice(StockTwice).fit(X, (A, B), verbose=0).history
    assert pool.history == ["traced", "reused"]
    assert_same_logs(found, expected)


def test_a_loss_that_is_set_on_the_model_itself():
    """As Keras has it, with parts of a batch too."""

    def fourth_power(x, y, y_pred, sample_weight=None, training=True):
        return keras.ops.mean((y - y_pred) ** 4)

    def logs(model):
        model.compute_loss = fourth_power
        return model.fit(X, A, 12, verbose=0, epochs=2).history["loss"]

    expected = logs(compiled(keras.Model, one, "mse"))
    found = logs(compiled(TapeModel, one, "mse", micro_batches=3))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
