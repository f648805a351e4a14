"""Threads, models inside callbacks and tapes, interrupts: right, and the next `fit` is clean."""

import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_tapefit import TapeModel, callbacks, hooks

RNG = np.random.default_rng(11)
X, Y = RNG.normal(size=(16, 4)).astype("float32"), RNG.normal(size=(16, 1)).astype("float32")


def make(seed=1, **compiled):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((4,))
    hidden = keras.layers.Dense(5, name=f"first{seed}")(inputs)
    hidden = keras.layers.BatchNormalization()(hidden)
    model = TapeModel(inputs, keras.layers.Dense(1)(hidden))
    made = [hooks.SkipNonFinite(), hooks.PercentileClipping(30, history=4), hooks.GradientMonitor()]
    optimizer = keras.optimizers.Adam(0.02, gradient_accumulation_steps=3)
    model.compile(**{"optimizer": optimizer, "loss": "mse", "gradient_hooks": made, **compiled})
    return model


def fit(model, epochs=2, **options):
    options = {"batch_size": 4, "shuffle": False, "verbose": 0, **options}
    return model.fit(X, Y, epochs=epochs, **options)


def state_of(model):
    of_hooks = [v for hook in model.gradient_hooks for v in hook.variables]
    found = [*model.weights, *model.optimizer.variables, *of_hooks]
    return [np.array(keras.ops.convert_to_numpy(v)) for v in found]


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def alone():
    """What two trainings, one after the other, come to without anything in between."""
    models = [make(1), make(2)]
    logs = [fit(model).history for model in models]
    return [state_of(model) for model in models], logs


def test_two_models_in_two_threads(alone):
    models = [make(1), make(2)]
    errors = []

    def train(model):
        try:
            fit(model)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=train, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not errors
    for model, expected in zip(models, alone[0], strict=True):
        assert_same(state_of(model), expected)


class Within(keras.callbacks.Callback):
    """Calls something in the middle of a training."""

    def __init__(self, call):
        super().__init__()
        self.call, self.number = call, 0

    def on_train_batch_end(self, batch, logs=None):
        self.number += 1
        if self.number in (2, 5):
            self.call(self.model)


INSIDE = {
    "evaluate": lambda model: model.evaluate(X, Y, verbose=0),
    "predict": lambda model: model.predict(X, verbose=0),
    "another model": lambda model: fit(make(2)),
    "gradients": lambda model: model.compute_gradients(X, Y),
    "call": lambda model: model(X),
}


@pytest.mark.slow
@pytest.mark.parametrize("call", INSIDE)
def test_inside_a_callback(alone, call):
    model = make(1)
    fit(model, callbacks=[Within(INSIDE[call])])
    if call != "evaluate":
        # Keras's own `evaluate` begins the metrics of the epoch again.
        assert_same(list(model.history.history.values()), list(alone[1][0].values()))
    assert_same(state_of(model), alone[0][0])


def test_inside_a_tape(alone):
    """The gradient of a user's own tape is that of `compute_gradients`, and nothing is left."""
    model = make(1, loss=keras.losses.MeanSquaredError())
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.square(Y - model(X, training=True)))
        own = model.compute_gradients(X, Y)
    found = tape.gradient(loss, model.trainable_variables)
    for a, b in zip(found, own.values(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    fresh = make(1)
    with tf.GradientTape(persistent=True):
        fit(fresh)
    assert_same(state_of(fresh), alone[0][0])


class Interrupt(keras.callbacks.Callback):
    def __init__(self, when, number):
        super().__init__()
        self.left = number
        setattr(self, when, self._count)

    def _count(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("when", "number"),
    [
        ("on_train_batch_end", 2),
        pytest.param("on_train_batch_end", 3, marks=pytest.mark.slow),
        pytest.param("on_test_batch_end", 1, marks=pytest.mark.slow),
    ],
    ids=["in a window", "after an update", "in validation"],
)
def test_an_interrupt_ends_at_a_step(when, number):
    """A `fit` that goes on afterwards is that of a model in this state."""
    model = make(1)
    csv = callbacks.GradientHistory()
    with pytest.raises(KeyboardInterrupt):
        fit(model, callbacks=[csv, Interrupt(when, number)], validation_data=(X, Y))
    twin = make(1)
    data = [(X[i : i + 4], Y[i : i + 4]) for i in range(0, 16, 4)]
    done = 4 if when == "on_test_batch_end" else number
    for x, y in data[:done]:
        twin.train_on_batch(x, y)
    if when == "on_test_batch_end":
        # The leftovers of the epoch were applied before.
        twin = make(1)
        fit(twin, epochs=1)
    assert_same(state_of(model), state_of(twin))
    for each in (model, twin):
        fit(each)
    assert_same(state_of(model), state_of(twin))


def test_an_interrupt_while_tracing(alone):
    class Once(hooks.GradientHook):
        fails = True

        def apply(self, gradients):
            if Once.fails:
                Once.fails = False
                raise KeyboardInterrupt
            return gradients

    model = make(1)
    handle = model.register_gradient_hook(Once())
    with pytest.raises(KeyboardInterrupt):
        fit(model)
    handle.remove()
    fit(model)
    assert_same(state_of(model), alone[0][0])
