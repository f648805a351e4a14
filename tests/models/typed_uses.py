"""Uses of the library as a type checker sees them; never run.

A line that ends in `# error` is a mistake that the checker is to find; a type that is told
by `assert_type` is to be known.
"""

from typing import Any, assert_type

import keras
import tensorflow as tf

import keras_tapefit
from keras_tapefit import Gradients, TapeModel, TapeSequential, backward, callbacks, hooks

inputs: Any = keras.Input((8,))
outputs: Any = keras.layers.Dense(1)(inputs)

model = TapeModel(inputs, outputs, name="model")
assert_type(model, TapeModel)
assert_type(TapeModel(inputs=inputs, outputs=outputs), TapeModel)
assert_type(TapeSequential([keras.Input((8,)), keras.layers.Dense(1)]), TapeSequential)
assert_type(TapeModel.from_model(keras.Model(inputs, outputs)), TapeModel)


class Net(TapeModel):
    def __init__(self, units: int, rate: float = 0.1) -> None:
        super().__init__(name="net")
        self.units = units

    def call(self, x: Any) -> Any:
        return x


net = Net(3)
assert_type(net, Net)
assert_type(net.units, int)
Net("three")  # error
Net(3, rat=0.1)  # error

model.compile("adam", "mse", gradient_hooks=[hooks.GlobalNormClipping(1.0)], micro_batches=2)
model.compile("adam", "mse", gradient_hook=[hooks.SkipNonFinite()])  # error
assert_type(model.gradient_hooks, hooks.HookList)
handle = model.register_gradient_hook(lambda g, v: g, targets="head/*")
assert_type(handle, hooks.HookHandle)
handle.remove()
model.register_gradient_hook(lambda g, v: g, target="head/*")  # error
model.freeze("backbone/*")
model.unfreeze()  # error

clipping = hooks.GlobalNormClipping(1.0, targets="*kernel", name="clip")
assert_type(clipping, hooks.GlobalNormClipping)
clipping.max_norm = 2.0
clipping.max_norm = keras.optimizers.schedules.ExponentialDecay(1.0, 5, 0.5)
hooks.GlobalNormClipping(max_nrm=1.0)  # error
hooks.SkipNonFinite(max_consecutive="three")  # error
hooks.PercentileClipping(10, histry=5)  # error
print(clipping.max_nrm)  # error
backward.SharpnessAware(rhoo=0.05)  # error
assert_type(backward.SharpnessAware(rho=0.05), backward.SharpnessAware)


class SignGradient(hooks.GradientHook):
    factor = hooks.Number(above=0)

    def __init__(self, factor: float, targets: Any = None, name: str | None = None) -> None:
        super().__init__(targets=targets, name=name)
        self.factor = factor

    def apply(self, gradients: Gradients) -> Gradients:
        return gradients.map(tf.sign).scale(self.factor)


assert_type(SignGradient(2.0), SignGradient)
SignGradient("two")  # error

callbacks.GradientHistory()
callbacks.GradientCSV()  # error
keras_tapefit.tuning.GradientHealth(3)
keras_tapefit.plots.norms(callbacks.GradientHistory())
print(keras_tapefit.tunning)  # error
