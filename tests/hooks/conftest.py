"""What tests of hooks share: hooks run on gradients made by hand, without a model."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import pytest
import tensorflow as tf

from keras_tapefit import Gradients, TapeModel, TapeSequential
from keras_tapefit.gradients.units import Unit, unit_axes
from keras_tapefit.hooks import GradientHook, HookList
from keras_tapefit.hooks.step import Step


class Bench:
    """Runs a hook on gradients, step after step, as an update would."""

    def __init__(self, hook: Any, variables: Sequence[Any], layer: Any = None) -> None:
        units = {} if layer is None else unit_axes(layer)
        self.variables = list(variables)
        self.hooks = HookList([hook])
        whole = {id(v): Unit(tuple(range(len(v.shape)))) for v in self.variables}
        units = {**whole, **units}
        self.hooks.prepare(
            self.variables, lambda v: units[id(v)], lambda v: v.path.rpartition("/")[0] or id(v)
        )
        self.hook: GradientHook = self.hooks[0]
        self.index = 0
        self.last: Step | None = None

    def __call__(self, *values: Any, loss: Any = None) -> list[Any]:
        """Returns what becomes of the gradients, dense, as NumPy arrays."""
        given = [tf.constant(v) if isinstance(v, list | float) else v for v in values]
        gradients = Gradients(zip(given, self.variables, strict=True)).with_unique_rows()
        self.last = Step(index=tf.constant(self.index, tf.int64), loss=loss)
        result = self.hooks.run(gradients, self.last)
        self.index += 1
        dense = [None if g is None else tf.convert_to_tensor(g) for g in result.values()]
        return [None if g is None else g.numpy() for g in dense]

    @property
    def rejected(self) -> bool:
        return any(bool(r) for r in self.last.rejections)

    @property
    def reports(self) -> dict[str, float]:
        return {entry.name: float(entry.value) for entry in self.last.entries}


@pytest.fixture
def bench() -> Callable[..., Bench]:
    """Makes a `Bench` of a hook, and variables or a built layer."""

    def make(hook: Any, of: Any) -> Bench:
        if isinstance(of, keras.layers.Layer):
            return Bench(hook, of.trainable_variables, of)
        shaped = [
            keras.Variable(tf.zeros(v), name=f"v{i}") if isinstance(v, tuple) else v
            for i, v in enumerate(of)
        ]
        return Bench(hook, shaped)

    return make


@pytest.fixture
def line() -> TapeSequential:
    """A linear model of two weights, without bias: `x = [3, 4]`, `y = 0` at weights of
    one gives the gradient `[42, 56]`, of norm 70. SGD with learning rate 1."""
    model = TapeSequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False, name="line")])
    model.compile(keras.optimizers.SGD(1.0), "mse")
    model.set_weights([tf.ones((2, 1))])
    return model


@pytest.fixture
def two_layers() -> TapeModel:
    """Two dense layers with biases; variable paths `first/kernel` to `second/bias`."""
    keras.utils.set_random_seed(7)
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(5, activation="tanh", name="first")(inputs)
    model = TapeModel(inputs, keras.layers.Dense(2, name="second")(hidden))
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse")
    return model
