"""Searches that used to get the scores of other trials: with and without reuse, all equal.

Each scenario builds and trains a model for each of some values, as a tuner does: once with
traces that are reused, once without. Weights, optimizer state, history and scores must be
the same, byte for byte. The scenarios differ in where the value comes in.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import os
import random
import re
import sys
import types
import warnings
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import absl.flags
import keras
import keras_tuner
import numpy as np
import pytest
import tensorflow as tf

from keras_tapefit import TapeModel, TapeSequential, backward, callbacks, hooks, tuning

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(44, 4)).astype("float32")
Y = (X[:, :1] * X[:, 1:2]).astype("float32")
ARGUMENTS: dict[str, Any] = dict(epochs=2, batch_size=16, verbose=0)

SETTINGS: Any = types.ModuleType("settings_of_a_search")
SETTINGS.__file__ = __file__
RATE = 1.0
COUNTER = [0]
KEPT: list[Any] = []


def dense(layer=None, loss="mse", optimizer="sgd", cls=TapeModel, **kwargs):
    inputs = keras.Input((4,))
    h = keras.layers.Dense(3, activation="tanh")(inputs)
    h = h if layer is None else layer(h)
    model = cls(inputs, keras.layers.Dense(1)(h))
    model.compile(optimizer, loss, **kwargs)
    return model


def squared(y, p):
    return keras.ops.mean((y - p) ** 2)


@dataclass(frozen=True)
class Scenario:
    """A search.

    Attributes:
        build: of a value.
        fit: of a model and a value; returns what is compared too.
        values: of the trials.
        reused: how many trials train with an earlier trace. `None`: may be any.
        warned: whether the check finds something, and says so.
        said: a part of the history.
        evaluates: whether the model is evaluated too.
    """

    build: Any
    fit: Any = None
    values: tuple[Any, ...] = (1.0, 0.3)
    reused: int | None = None
    warned: bool = False
    said: str = ""
    evaluates: bool = False


def fit(model, value, **kwargs):
    return model.fit(X, Y, **{**ARGUMENTS, **kwargs}).history


def run(scenario, reuse):
    """Returns the history of the search, and all that came of each trial."""
    hypermodel = tuning.TapeHyperModel(lambda hp: scenario.build(hp.get("value")), reuse=reuse)
    COUNTER[:] = [0]
    KEPT.clear()
    found = []
    for value in scenario.values:
        keras.utils.clear_session()
        keras.utils.set_random_seed(0)
        hp = keras_tuner.HyperParameters()
        hp.Fixed("value", value)
        model = hypermodel.build(hp)
        scores = (scenario.fit or fit)(model, value)
        if scenario.evaluates:
            scores = scores, model.evaluate(X, Y, verbose=0, return_dict=True)
        found.append((scores, [v.numpy() for v in [*model.variables, *model.optimizer.variables]]))
    return hypermodel.history, found


def assert_same(found, expected):
    for (scores, values), (other_scores, others) in zip(found, expected, strict=True):
        assert scores == other_scores
        for one, other in zip(values, others, strict=True):
            np.testing.assert_array_equal(one, other)


SCENARIOS: dict[str, Scenario] = {}


def scenario(name, *args, **kwargs):
    SCENARIOS[name] = Scenario(*args, **kwargs)


def adam(value):
    return keras.optimizers.Adam(0.01 * value)


# What trials differ in where people expect reuse.
scenario("learning rate", lambda v: dense(optimizer=adam(v)), reused=1)
for cls, arguments in {
    "CosineDecay": dict(decay_steps=7, alpha=0.1),
    "ExponentialDecay": dict(decay_steps=3, decay_rate=0.9),
    "PolynomialDecay": dict(decay_steps=5, power=2.0),
    "InverseTimeDecay": dict(decay_steps=3, decay_rate=0.5),
    "CosineDecayRestarts": dict(first_decay_steps=4, alpha=0.01),
}.items():
    schedule = getattr(keras.optimizers.schedules, cls)
    scenario(
        f"learning rate inside {cls}",
        lambda v, s=schedule, a=arguments: dense(optimizer=keras.optimizers.Adam(s(0.02 * v, **a))),
        reused=1,
    )
scenario(
    "warmup",
    lambda v: dense(
        optimizer=keras.optimizers.SGD(
            keras.optimizers.schedules.CosineDecay(0.0, 7, warmup_target=0.1 * v, warmup_steps=3)
        )
    ),
    reused=1,
)
scenario(
    "seeds",
    lambda v: dense(keras.layers.Dropout(0.2, seed=int(10 * v))),
    reused=1,
)
scenario(
    "seeds of all",
    lambda v: (keras.utils.set_random_seed(int(10 * v)), dense(keras.layers.Dropout(0.2)))[1],
    reused=1,
)
scenario(
    "epochs of Freezing",
    lambda v: dense(gradient_hooks=[hooks.Freezing("dense/*", epochs=v)]),
    values=(1, 2),
    # That of the frozen and that of the unfrozen model.
    reused=1,
)


def keeps_hp(value):
    model = dense(optimizer=adam(value))
    model.hp = keras_tuner.HyperParameters()
    model.hp.Fixed("value", value)
    return model


def class_in_build(value):
    class Scale(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.power = 2

        def call(self, x):
            return x**self.power

    class Net(TapeModel):
        pass

    return dense(Scale(), cls=Net, optimizer=adam(value))


scenario("a model that keeps hp", keeps_hp, reused=1)
scenario("classes defined in build", class_in_build, reused=1)
scenario("rho", lambda v: dense(backward=backward.SharpnessAware(0.1 * v)), reused=1)
scenario(
    "numbers of hooks",
    lambda v: dense(
        gradient_hooks=[
            hooks.SkipNonFinite(),
            hooks.GlobalNormClipping(v),
            hooks.GradientNoise(0.01 * v, seed=int(10 * v)),
            hooks.GradientMonitor(per_variable=True),
        ]
    ),
    reused=1,
)

# The ways in which a model is trained.
for name, arguments in {
    "XLA": dict(jit_compile=True),
    "XLA for the update": dict(jit_compile="update"),
    "several steps": dict(steps_per_execution=2),
    "more steps than batches": dict(steps_per_execution=5),
    "several steps by XLA": dict(steps_per_execution=2, jit_compile=True),
    "micro-batches": dict(micro_batches=2),
    "metrics": dict(metrics=["mae"], weighted_metrics=["mse"]),
    "a gate": dict(gradient_hooks=[hooks.SkipNonFinite]),
    "validation": dict(gradient_hooks=[lambda: hooks.GradientMonitor(validation=True)]),
}.items():
    scenario(
        f"learning rate, {name}",
        lambda v, a=arguments: dense(
            keras.layers.Dropout(0.1),
            optimizer=adam(v),
            **{k: [h() for h in x] if k == "gradient_hooks" else x for k, x in a.items()},
        ),
        reused=1,
        evaluates=True,
    )
scenario(
    "learning rate, accumulated",
    lambda v: dense(optimizer=keras.optimizers.Adam(0.01 * v, gradient_accumulation_steps=2)),
    reused=1,
)
scenario(
    "learning rate, loss scale",
    lambda v: dense(optimizer=keras.optimizers.LossScaleOptimizer(adam(v))),
    reused=1,
)
scenario(
    "learning rate, averages",
    lambda v: dense(optimizer=keras.optimizers.Adam(0.01 * v, use_ema=True, ema_momentum=0.9)),
    reused=1,
)


class Nested(TapeModel):
    """Nested functions, a loop and a branch in the step."""

    def __init__(self):
        super().__init__()
        self.first = keras.layers.Dense(3)
        # Keras trains no weights that are made inside a `tf.function`.
        self.first.build((None, 4))
        self.rnn = keras.layers.SimpleRNN(2)
        self.last = keras.layers.Dense(1)

    @tf.function
    def inner(self, x):
        return tf.nn.tanh(self.first(x))

    def call(self, x):
        h = self.inner(x)
        h = tf.cond(tf.reduce_sum(h) > 0.0, lambda: self.inner(x) * 2.0, lambda: h)
        h = tf.while_loop(
            lambda i, h: i < 3, lambda i, h: (i + 1, h * 0.9), (0, h), maximum_iterations=3
        )[1]
        return self.last(self.rnn(tf.stack([h, h], axis=1)))


def nested(value, **kwargs):
    model = Nested()
    model.compile(adam(value), "mse", **kwargs)
    return model


scenario("learning rate, nested functions", nested, reused=1)
scenario(
    "learning rate, nested functions, steps", lambda v: nested(v, steps_per_execution=2), reused=1
)
scenario("learning rate, nested functions, XLA", lambda v: nested(v, jit_compile=True), reused=1)


class Custom(TapeModel):
    """A step of its own, with our tape or without."""

    with_tape = True

    def train_step(self, data):
        x, y = data
        with self.gradient_tape() if self.with_tape else tf.GradientTape() as tape:
            loss = tf.reduce_mean((self(x, training=True) - y) ** 2)
        if self.with_tape:
            tape.minimize(loss)
        else:
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss, "twice": 2.0 * loss}


class CustomWithout(Custom):
    with_tape = False


scenario("learning rate, a custom step", lambda v: dense(optimizer=adam(v), cls=Custom), reused=1)
scenario(
    "learning rate, a custom step with a gate",
    lambda v: dense(
        optimizer=adam(v),
        cls=Custom,
        gradient_hooks=[hooks.SkipNonFinite(), hooks.GradientMonitor()],
    ),
    reused=1,
)
scenario(
    "learning rate, a custom step without our tape",
    lambda v: dense(optimizer=adam(v), cls=CustomWithout),
    reused=1,
)


def batch_norm(value, loss="mse"):
    # The gradient of the bias in front of it is rounding, which Adam makes large.
    inputs = keras.Input((4,))
    h = keras.layers.BatchNormalization()(keras.layers.Dense(5)(inputs))
    model = TapeModel(inputs, keras.layers.Dense(1)(keras.layers.ReLU()(h)))
    model.compile(adam(value), loss)
    return model


scenario("learning rate, a gradient that is rounding only", batch_norm, reused=1)


# The data, and what is done with a model beside `fit`.
def unknown_length():
    data = tf.data.Dataset.from_tensor_slices((X, Y)).filter(lambda x, y: x[0] > -1.0)
    return data.batch(16)


class Generated(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        part = slice(16 * index, 16 * index + 16)
        return X[part], Y[part], np.linspace(0.0, 1.0, len(X[part]), dtype="float32")


def fit_on(data, **kwargs):
    def train(model, value):
        return model.fit(data(), epochs=2, verbose=0, **kwargs).history

    return train


def fit_and_more(model, value):
    first = model.train_on_batch(X[:7], Y[:7])
    history = fit(model, value, sample_weight=np.abs(X[:, 0]), validation_data=(X[:9], Y[:9]))
    return first, history, model.train_on_batch(X[:7], Y[:7]), model.predict(X, verbose=0).tolist()


class Freezes(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        (self.model.freeze if epoch % 2 else self.model.unfreeze)("dense/*")


def fit_freezing(model, value):
    return fit(model, value, epochs=4, callbacks=[Freezes()])


def fit_recorded(model, value):
    history = callbacks.GradientHistory()
    return fit(model, value, callbacks=[history]), repr(history.to_numpy())


def noisy(value, **kwargs):
    return dense(keras.layers.GaussianNoise(0.1), optimizer=adam(value), **kwargs)


# Batches that are fetched one by one, because they may end early.
scenario("unknown length", noisy, fit_on(unknown_length), reused=1)
scenario(
    "unknown length, several steps",
    lambda v: noisy(v, steps_per_execution=2),
    fit_on(unknown_length),
    reused=1,
)
scenario(
    "unknown length, XLA", lambda v: noisy(v, jit_compile=True), fit_on(unknown_length), reused=1
)
scenario(
    "steps of an epoch",
    noisy,
    fit_on(lambda: unknown_length().repeat(), steps_per_epoch=3),
    reused=1,
)
scenario("a PyDataset with weights", noisy, fit_on(Generated), reused=1)
scenario("batches by hand too", noisy, fit_and_more, reused=1)
scenario("frozen and unfrozen by a callback", noisy, fit_freezing, reused=2)
scenario(
    "recorded",
    lambda v: noisy(v, gradient_hooks=[hooks.GlobalNormClipping(v)]),
    fit_recorded,
    reused=1,
)


def recurrent(value):
    model = TapeSequential(
        [
            keras.Input((4,)),
            keras.layers.Discretization(bin_boundaries=[-1.0, 0.0, 1.0]),
            keras.layers.Embedding(4, 3),
            keras.layers.LSTM(3, recurrent_dropout=0.1),
            keras.layers.Dense(1),
        ]
    )
    model.compile(adam(value), "mse", gradient_hooks=[hooks.PercentileClipping(50)])
    return model


def mixed(value):
    model = dense(keras.layers.Dense(3, dtype="mixed_float16"), optimizer=adam(value))
    return model


SHARED: list[Any] = []


def sharing(value):
    if not COUNTER[0]:
        SHARED[:] = [keras.layers.Dense(3, name="shared")]
    COUNTER[0] += 1
    return dense(SHARED[0], optimizer=adam(value))


def private(value):
    method = backward.PerExampleClipping(value, noise_multiplier=0.1, seed=0)
    return dense(optimizer=adam(1.0), backward=method)


scenario("an Embedding and an LSTM", recurrent, reused=1)
scenario("mixed_float16", mixed, reused=1)
scenario("a layer of all trials", sharing)
scenario("private", private, reused=None)
scenario(
    "two outputs",
    lambda v: two_outputs(v),
    lambda m, v: m.fit(X, {"a": Y, "b": X[:, :2]}, epochs=2, verbose=0).history,
    reused=1,
)


def two_outputs(value):
    inputs = keras.Input((4,))
    h = keras.layers.Dense(3)(inputs)
    a, b = keras.layers.Dense(1, name="a")(h), keras.layers.Dense(2, name="b")(h)
    model = TapeModel(inputs, {"a": a, "b": b})
    losses, weights = {"a": "mse", "b": "mae"}, {"a": 1.0, "b": 0.5}
    model.compile(adam(value), losses, loss_weights=weights, metrics={"a": ["mae"]})
    return model


# T1: functions of the model that live on.
def fit_with_function(model, value):
    infer = tf.function(model)
    before = infer(X).numpy().tolist()
    values = [v.value for v in model.trainable_variables]
    history = fit(model, value)
    KEPT.append((infer, model))
    np.testing.assert_array_equal(infer(X), model(X))
    for kept, variable in zip(values, model.trainable_variables, strict=True):
        np.testing.assert_array_equal(kept, variable.numpy())
    ensemble = [float(np.mean(function(X))) for function, _ in KEPT]
    return history, before, ensemble


scenario(
    "functions made before fit", lambda v: dense(optimizer=adam(v)), fit_with_function, reused=1
)


class Scores(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        self.infer = tf.function(self.model)
        self.found = []

    def on_epoch_end(self, epoch, logs=None):
        self.found.append(float(tf.reduce_mean(self.infer(X))))


def fit_with_scores(model, value):
    scores = Scores()
    return fit(model, value, callbacks=[scores]), scores.found


scenario("a callback that scores", lambda v: dense(optimizer=adam(v)), fit_with_scores, reused=1)


def fit_earlier_again(model, value):
    history = fit(model, value)
    KEPT.append(model)
    return history, [fit(earlier, value) for earlier in KEPT]


scenario("earlier models go on", lambda v: dense(optimizer=adam(v)), fit_earlier_again, reused=1)


# T2: attributes set by callbacks.
class Weighted(keras.layers.Layer):
    weight = 0.0

    def call(self, x):
        self.add_loss(self.weight * keras.ops.mean(x**2))
        return x


def set_in(when, find, name):
    class Sets(keras.callbacks.Callback):
        def __init__(self, value):
            super().__init__()
            self.value = value

    def set_it(self, *args, **kwargs):
        setattr(find(self.model), name, self.value)

    setattr(Sets, when, set_it)
    return lambda model, value: fit(model, value, callbacks=[Sets(value)])


for when in ("on_train_begin", "on_epoch_begin", "on_train_batch_begin", "on_test_begin"):
    scenario(
        f"a weight set in {when}",
        lambda v: dense(Weighted()),
        set_in(when, lambda m: m.layers[2], "weight"),
        values=(0.5, 0.1, 0.1),
        reused=None,
        evaluates=True,
    )
scenario(
    "a rate of dropout set in on_train_begin",
    lambda v: dense(keras.layers.Dropout(0.5)),
    set_in("on_train_begin", lambda m: m.layers[2], "rate"),
    values=(0.5, 0.1, 0.1),
    reused=1,
)
scenario(
    "clipnorm set in on_epoch_begin",
    lambda v: dense(optimizer=keras.optimizers.SGD(0.1, clipnorm=1.0)),
    set_in("on_epoch_begin", lambda m: m.optimizer, "clipnorm"),
    values=(0.5, 0.1, 0.1),
    reused=1,
)


# T3: numbers from elsewhere.
absl.flags.DEFINE_float("tapefit_test_rate", 1.0, "of a loss")


def from_module(y, p):
    import settings_of_a_search

    return settings_of_a_search.FACTOR * squared(y, p)


def by_getattr(y, p):
    return getattr(sys.modules["settings_of_a_search"], "FAC" + "TOR") * squared(y, p)


def from_environment(y, p):
    return float(os.environ["TAPEFIT_TEST_RATE"]) * squared(y, p)


def from_file(y, p):
    with open(os.environ["TAPEFIT_TEST_FILE"]) as file:
        return float(file.read()) * squared(y, p)


def from_flags(y, p):
    return absl.flags.FLAGS.tapefit_test_rate * squared(y, p)


def from_global(y, p):
    return RATE * squared(y, p)


@functools.wraps(keras.losses.mean_squared_error)
def wrapped(y, p):
    return RATE * squared(y, p)


class FromModule(keras.losses.Loss):
    def call(self, y, p):
        return sys.modules["settings_of_a_search"].FACTOR * keras.ops.mean((y - p) ** 2, axis=-1)


@contextlib.contextmanager
def elsewhere(value, path):
    global RATE
    if not absl.flags.FLAGS.is_parsed():
        absl.flags.FLAGS.mark_as_parsed()
    sys.modules["settings_of_a_search"] = SETTINGS
    SETTINGS.FACTOR = RATE = absl.flags.FLAGS.tapefit_test_rate = value
    os.environ["TAPEFIT_TEST_RATE"] = str(value)
    os.environ["TAPEFIT_TEST_FILE"] = path
    with open(path, "w") as file:
        file.write(str(value))
    yield
    del sys.modules["settings_of_a_search"]


def fit_elsewhere(model, value):
    with elsewhere(value, os.path.join(os.environ["TAPEFIT_TEST_DIRECTORY"], "value")):
        return fit(model, value)


def evaluate_elsewhere(model, value):
    history = model.fit(X, Y, epochs=1, verbose=0).history
    with elsewhere(value, os.path.join(os.environ["TAPEFIT_TEST_DIRECTORY"], "value")):
        return history, model.evaluate(X, Y, verbose=0)


for loss, said in [
    (from_module, ""),
    (by_getattr, ""),
    (from_environment, ""),
    (from_file, ""),
    (from_flags, ""),
    (FromModule, ""),
    (from_global, "RATE"),
    (wrapped, "RATE"),
]:
    # The second trial is like the first, the third is not.
    scenario(
        f"a loss {loss.__name__}",
        lambda v, f=loss: dense(loss=f() if isinstance(f, type) else f),
        fit_elsewhere,
        values=(1.0, 1.0, 0.999),
        reused=None if said else 1,
        warned=not said,
        said=said or "traced again: after the first step",
    )


scenario(
    "a loss from the environment beside a gradient that is rounding only",
    lambda v: batch_norm(1.0, from_environment),
    fit_elsewhere,
    values=(1.0, 1.0, 0.9999),
    reused=1,
    warned=True,
)


class OnlyInEvaluation(keras.layers.Layer):
    def call(self, x, training=False):
        return x if training else x * float(os.environ.get("TAPEFIT_TEST_RATE", 1.0))


scenario(
    "an evaluation from the environment",
    lambda v: dense(OnlyInEvaluation()),
    evaluate_elsewhere,
    values=(1.0, 1.0, 0.5),
    reused=2,
    warned=True,
    said="evaluation traced again: after the first step",
)


# T4: attributes with names of Keras's own, or ours.
class Named(keras.layers.Layer):
    def __init__(self, name, value):
        super().__init__()
        self.attribute = name
        object.__setattr__(self, name, value)

    def call(self, x):
        return x * getattr(self, self.attribute)


for name in ("_nodes", "_watched", "history", "__x__", "_tapefit_state", "_owners"):
    scenario(f"a layer with the attribute {name}", lambda v, n=name: dense(Named(n, v)), reused=0)


class Drawing(keras.layers.Layer):
    def __init__(self, value):
        super().__init__()
        self.step_initializer = keras.initializers.RandomNormal(seed=int(10 * value))

    def call(self, x):
        return x + self.step_initializer((3,))


class Sharp(backward.SharpnessAware):
    def compute(self, objective, batch):
        computed = super().compute(objective, batch)
        (quotient,) = computed.quotients
        scaled = quotient.gradients.scale(float(self.rho))
        return replace(computed, quotients=[replace(quotient, gradients=scaled)])


class Watching(hooks.GradientHook):
    def __init__(self, factor):
        super().__init__()
        self._watched = factor

    def apply(self, gradients):
        return gradients.scale(self._watched)


scenario(
    "an initializer in a step",
    lambda v: dense(Drawing(v)),
    values=(1.0, 0.3),
    reused=0,
    warned=True,
)
scenario("a subclass that reads rho", lambda v: dense(backward=Sharp(0.1 * v)), reused=0)
scenario("a hook that keeps _watched", lambda v: dense(gradient_hooks=[Watching(v)]), reused=0)


# T5: containers and numbers with more to them.
class Rates(dict):
    pass


class Rate(float):
    def __new__(cls, value, factor):
        self = super().__new__(cls, value)
        self.factor = factor
        return self


class Table(np.ndarray):
    factor = 1.0


class Pair(NamedTuple):
    value: float

    def scaled(self):
        return self.value * FACTORS[0]


FACTORS = [1.0]


class Meta(type):
    factor = 1.0


class Slots:
    __slots__ = ("factor",)

    def __init__(self, factor):
        self.factor = factor


class Holds(keras.layers.Layer):
    def __init__(self, holder, read):
        super().__init__()
        object.__setattr__(self, "holder", holder)
        self.read = read

    def call(self, x):
        return x * self.read(self.holder)


def with_attribute(value, factor):
    value.factor = factor
    return value


def method_of_pair(value):
    class Mine(Pair):
        def scaled(self, factor=value):
            return self.value * factor

    return Mine(1.0)


def class_with_meta(value):
    class MyMeta(type):
        factor = value

    return MyMeta("Mine", (), {})


HOLDERS = {
    "dict": (lambda v: with_attribute(Rates(a=1.0), v), lambda h: h.factor),
    "float": (lambda v: Rate(1.0, v), lambda h: h.factor),
    "ndarray": (lambda v: with_attribute(np.ones(3).view(Table), v), lambda h: h.factor),
    "NamedTuple": (method_of_pair, lambda h: h.scaled()),
    "metaclass": (class_with_meta, lambda h: h.factor),
    "slots": (Slots, lambda h: h.factor),
    "ordered dict": (lambda v: collections.OrderedDict(a=v), lambda h: h["a"]),
    "SimpleNamespace": (lambda v: types.SimpleNamespace(a=[{"b": (v,)}]), lambda h: h.a[0]["b"][0]),
    "partial": (lambda v: functools.partial(lambda a: a, v), lambda h: h()),
    "method": (
        lambda v: types.SimpleNamespace(f=Slots(v).__getattribute__),
        lambda h: h.f("factor"),
    ),
    "tensor": (lambda v: tf.constant(v), lambda h: h),
}
for name, (make, read) in HOLDERS.items():
    scenario(f"a {name}", lambda v, m=make, r=read: dense(Holds(m(v), r)), reused=0)


# T6: Python's own state.
class Counts(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self.count = 0

    def call(self, x):
        self.count += 1
        return x * self.count


class CountingMetric(keras.metrics.Mean):
    count = 0

    def update_state(self, y, p, sample_weight=None):
        type(self).count += 1
        return super().update_state(self.count * (y - p))


class Draws(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self.generator = np.random.default_rng(0)

    def call(self, x):
        return x * self.generator.uniform()


def counts_globally(y, p):
    COUNTER[0] += 1
    return COUNTER[0] * squared(y, p)


def metric_of_trial():
    return type("Counting", (CountingMetric,), {})(name="counting")


for name, make in {
    "a layer that counts": lambda v: dense(Counts(), optimizer=adam(v)),
    "a metric that counts": lambda v: dense(metrics=[metric_of_trial()], optimizer=adam(v)),
    "a NumPy generator": lambda v: dense(Draws(), optimizer=adam(v)),
    "NumPy's own numbers": lambda v: dense(
        loss=lambda y, p: np.random.uniform() * squared(y, p), optimizer=adam(v)
    ),
    "Python's own numbers": lambda v: dense(
        loss=lambda y, p: random.random() * squared(y, p), optimizer=adam(v)
    ),
    "a global that counts": lambda v: dense(loss=counts_globally, optimizer=adam(v)),
}.items():
    scenario(name, make, reused=0, said="traced again")


# T7: what a walk stumbles over.
class Dotted(dict):
    __getattr__ = dict.__getitem__


DOTTED = Dotted(a=1.0)


def with_dotted(y, p):
    return DOTTED.a * squared(y, p)


def linked(length):
    first = current = types.SimpleNamespace(next=None)
    for _ in range(length):
        current.next = types.SimpleNamespace(next=None)
        current = current.next
    return first


class Hostile:
    def __getattr__(self, name):
        raise RuntimeError(name)

    def __eq__(self, other):
        raise RuntimeError("equal")

    def __hash__(self):
        raise RuntimeError("hash")

    def __repr__(self):
        raise RuntimeError("repr")

    def __bool__(self):
        raise RuntimeError("bool")

    def __len__(self):
        raise RuntimeError("len")


def holding(value):
    return lambda v: dense(Holds(value(), lambda h: 1.0), optimizer=adam(v))


scenario("a dict with __getattr__", lambda v: dense(loss=with_dotted, optimizer=adam(v)), reused=1)
scenario("a linked list", holding(lambda: linked(5000)), reused=1)
scenario("an object that raises", holding(Hostile), reused=1)
scenario("a dict with a key that raises", holding(lambda: {("a", 1): Hostile()}), reused=1)


# What a call of Keras's own leaves behind is no difference.
def stacked(value, **kwargs):
    cells = [keras.layers.LSTM(3, dropout=0.1, seed=1, return_sequences=True), keras.layers.GRU(2)]
    layers = [keras.Input((4,)), keras.layers.Reshape((2, 2)), *cells, keras.layers.Dense(1)]
    model = TapeSequential(layers)
    model.compile(keras.optimizers.AdamW(0.01 * value), "mse", **kwargs)
    return model


scenario("AdamW, recurrent layers, a Sequential", stacked, reused=1)


class Counted(keras.losses.Loss):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def call(self, y, p):
        self.calls += 1
        return self.calls * keras.ops.mean((y - p) ** 2)


scenario("a loss that counts", lambda v: dense(loss=Counted(), optimizer=adam(v)), reused=0)


# Of several kinds at once.
scenario(
    "a loss from a file, several steps, a gate",
    lambda v: dense(
        keras.layers.Dropout(0.2),
        loss=from_file,
        steps_per_execution=2,
        gradient_hooks=[hooks.SkipNonFinite(), hooks.GradientMonitor()],
    ),
    fit_elsewhere,
    values=(1.0, 1.0, 0.999),
    reused=1,
    warned=True,
)
scenario(
    "a layer that counts, several steps, micro-batches",
    lambda v: dense(Counts(), optimizer=adam(v), steps_per_execution=2, micro_batches=2),
    reused=0,
)
scenario(
    "clipnorm set in on_epoch_begin, a schedule, accumulated",
    lambda v: dense(
        optimizer=keras.optimizers.SGD(
            keras.optimizers.schedules.ExponentialDecay(0.1 * v, 3, 0.9),
            clipnorm=1.0,
            gradient_accumulation_steps=2,
        )
    ),
    set_in("on_epoch_begin", lambda m: m.optimizer, "clipnorm"),
    values=(0.5, 0.1, 0.1),
    reused=1,
)


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    monkeypatch.setenv("TAPEFIT_TEST_DIRECTORY", str(tmp_path))
    monkeypatch.delenv("TAPEFIT_TEST_RATE", raising=False)


# Compiled by XLA, or like others that are tried every day.
SLOW = ("XLA", "inside Co", "inside Po", "inside In", "on_epoch_begin", "nested functions,")


def marked(name):
    is_slow = any(part in name for part in SLOW)
    marks = [pytest.mark.slow, pytest.mark.long] if is_slow else [pytest.mark.slow]
    return pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", list(map(marked, SCENARIOS)))
def test_reuse_changes_nothing(name):
    scenario = SCENARIOS[name]
    with warnings.catch_warnings(record=True) as caught:
        # Those of Keras, of data that ran out, say, are the same in both.
        warnings.simplefilter("always")
        _, expected = run(scenario, False)
        history, found = run(scenario, True)
    ours = [w for w in caught if "traced for an earlier trial" in str(w.message)]
    assert_same(found, expected)
    assert bool(ours) == scenario.warned, [str(w.message) for w in caught]
    if scenario.reused is not None:
        assert history.count("reused") == scenario.reused, history
    assert re.search(re.escape(scenario.said), "; ".join(history)), history
