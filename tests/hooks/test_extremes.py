"""Numbers at the end of what floats can hold, in models and in every kind of program."""

import contextlib
import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_tapefit import Gradients, TapeModel, hooks
from keras_tapefit.gradients import norms, xla
from keras_tapefit.hooks.step import Step

pytestmark = pytest.mark.slow

MODES = {
    "graph": {"jit_compile": False},
    "XLA": {"jit_compile": True},
    "update in XLA": {"jit_compile": "update"},
    "eager": {"run_eagerly": True},
}
BOUNDED = {
    "GlobalNormClipping": (hooks.GlobalNormClipping, "max_norm"),
    "NormClipping": (hooks.NormClipping, "max_norm"),
    "per layer": (lambda c: hooks.NormClipping(c, per_layer=True), "max_norm"),
    "ValueClipping": (hooks.ValueClipping, "max_value"),
    "BlockRMSClipping": (hooks.BlockRMSClipping, "max_rms"),
    "AdaptiveClipping": (hooks.AdaptiveClipping, "max_ratio"),
}
X, Y = np.array([[3.0, 4.0]]), np.array([[0.0]])


def _seen(model):
    model.set_weights([np.ones((2, 1))])
    model.train_on_batch(X, Y)
    return 1 - model.get_weights()[0].ravel()


def _line(hook, mode="graph", dtype="float32"):
    """The gradient is `[42, 56]`, of norm 70."""
    dense = layers.Dense(1, use_bias=False, name="line", dtype=dtype)
    inputs = keras.Input((2,), dtype=dtype)
    model = TapeModel(inputs, dense(inputs))
    model.compile(keras.optimizers.SGD(1.0), "mse", gradient_hooks=[hook], **MODES[mode])
    return model


def _at(value):
    """Gives numbers step by step: a bound of 5 at first, then `value`."""
    return lambda step: tf.where(step < 1, 5.0, value)


class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    def __init__(self, value):
        self.value = value

    def __call__(self, step):
        return _at(self.value)(step)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", BOUNDED)
def test_a_bound_without_end_is_no_bound(name, mode):
    make, argument = BOUNDED[name]
    for value in (math.inf, 1e39, 10**400):
        model = _line(make(value), mode)
        np.testing.assert_array_equal(_seen(model), [42, 56])
    (hook,) = model.gradient_hooks
    setattr(hook, argument, 1e-3)
    assert np.linalg.norm(_seen(model)) < 1
    setattr(hook, argument, math.inf)
    np.testing.assert_array_equal(_seen(model), [42, 56])


@pytest.mark.parametrize("kind", [_at, Schedule])
@pytest.mark.parametrize("value", [math.inf, math.nan, -1.0, 0.0, -math.inf])
@pytest.mark.parametrize("name", ["GlobalNormClipping", "ValueClipping", "AdaptiveClipping"])
def test_a_bound_that_cannot_be_used_is_no_bound(name, value, kind):
    make, _ = BOUNDED[name]
    model = _line(make(kind(value)))
    assert abs(_seen(model)).max() < 41
    np.testing.assert_array_equal(_seen(model), [42, 56])


STEPS = {
    "factor": (hooks.GradientScaling, {math.nan: 1, math.inf: 1, -2.0: -2, 0.0: 0}),
    "rate": (hooks.LearningRateMultiplier, {math.nan: 1, math.inf: 1, -2.0: 0, 0.0: 0, 0.5: 0.5}),
    "noise": (hooks.GradientNoise, {math.nan: 1, math.inf: 1, -2.0: 1, 0.0: 1}),
    "percentile": (hooks.PercentileClipping, {math.nan: 1, 200.0: 1, -5.0: 1}),
    "spikes": (hooks.SkipSpikes, {math.nan: 1, -1.0: 1}),
}


@pytest.mark.filterwarnings("ignore:.* is no freezing")
@pytest.mark.parametrize("name", STEPS)
def test_other_numbers_that_cannot_be_used(name):
    make, cases = STEPS[name]
    for value, factor in cases.items():
        model = _line(make(lambda step, value=value: tf.constant(value)))
        for _ in range(2):
            np.testing.assert_allclose(_seen(model), [42 * factor, 56 * factor], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "given", "expected"),
    [
        ({}, math.nan, 0.0),
        ({"minimum": 2}, 1.0, 2.0),
        ({"minimum": 2}, math.nan, 2.0),
        ({"maximum": -2}, math.nan, -2.0),
        ({"maximum": 3}, 5.0, 3.0),
        ({"above": 1}, 1.0, 1.0000001),
        ({"above": 0, "neutral": 7.0}, 0.0, 7.0),
        ({"neutral": 7.0}, math.inf, 7.0),
        ({"neutral": math.inf}, math.inf, math.inf),
        ({"above": 0}, math.inf, math.inf),
    ],
)
def test_what_a_number_makes_of_what_it_is_given(bench, options, given, expected):
    seen = []

    class Looks(hooks.GradientHook):
        number = hooks.Number(**options)

        def apply(self, gradients):
            seen.append(self.number)
            return gradients

    hook = Looks()
    hook.number = lambda step: tf.constant(given)
    bench(hook, [(1,)])([1.0])
    (value,) = seen
    assert value.dtype == tf.float32 and value.shape == ()
    assert float(value) == pytest.approx(expected)
    assert options.get("above") is None or float(value) > options["above"]


def test_a_number_is_a_scalar(line):
    line.gradient_hooks = [hooks.GradientScaling(lambda step: tf.ones(2))]
    with pytest.raises(ValueError, match=r"`factor` must be a scalar at each step. .*\(2,\)"):
        line.train_on_batch(X, Y)


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e39, 10**400])
def test_factors_are_finite(value):
    for make in (hooks.GradientScaling, hooks.LearningRateMultiplier, hooks.GradientNoise):
        with pytest.raises(ValueError, match=r"must be a number up to 3.4e\+38|zero or a pos"):
            make(value)


# Gradients


HUGE = {
    "3e38": ([3e38, 0.0], "float32"),
    "norm beyond float32": ([3e38, 3e38], "float32"),
    "largest": ([np.finfo("float32").max] * 2, "float32"),
    "1e30": ([3e30, 4e30], "float32"),
    "1e-30": ([3e-30, 4e-30], "float32"),
    "1e300": ([3e300, 4e300], "float64"),
    "norm beyond float64": ([1.7e308, 1.7e308], "float64"),
    "1e-300": ([3e-300, 4e-300], "float64"),
    "float16": ([6e4, 6e4], "float16"),
}
JOINT = ["GlobalNormClipping", "NormClipping", "per layer", "BlockRMSClipping", "AdaptiveClipping"]


@pytest.mark.parametrize("jit_compile", [False, True, None])
@pytest.mark.parametrize("name", JOINT)
@pytest.mark.parametrize("size", HUGE)
def test_norms_of_any_size(bench, name, size, jit_compile):
    values, dtype = HUGE[size]
    true = np.asarray(values, dtype).astype(np.longdouble)
    largest = np.abs(true).max()
    length = largest * np.sqrt(np.sum((true / largest) ** 2))
    bound = 1.0 if length > 1 else float(length / 1000)
    per = {"BlockRMSClipping": math.sqrt(2), "AdaptiveClipping": math.sqrt(2)}.get(name, 1.0)
    variable = keras.Variable(np.ones(2), dtype=dtype, name="v")
    run = bench(BOUNDED[name][0](bound / per), [variable])
    gradient = tf.constant(true, dtype)

    def clip(g):
        pairs = Gradients([(g, variable)])
        return run.hooks.run(pairs, Step(index=tf.constant(0, tf.int64))).values()

    call = (
        clip if jit_compile is None else tf.function(clip, jit_compile=jit_compile, autograph=False)
    )
    (result,) = call(gradient)
    rtol = 2e-3 if dtype == "float16" else 1e-5
    np.testing.assert_allclose(result.numpy().astype(np.longdouble), true * (bound / length), rtol)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", BOUNDED)
def test_the_smallest_floats_stay(bench, name, dtype):
    smallest = np.finfo(dtype).smallest_subnormal
    small, large = (keras.Variable(np.ones(2), dtype=dtype, name=n) for n in "ab")
    run = bench(BOUNDED[name][0](1.0), [small, large])
    values = np.full(2, 3 * smallest, dtype)
    alone, _ = run(tf.constant(values), None)
    np.testing.assert_array_equal(alone.view("uint8"), values.view("uint8"))
    if name != "GlobalNormClipping" and name != "per layer":
        beside, clipped = run(tf.constant(values), tf.constant([300, 400], dtype))
        np.testing.assert_array_equal(beside.view("uint8"), values.view("uint8"))
        assert np.abs(clipped).max() < 2


# Scalars and what is empty


class Odd(TapeModel):
    """A weight of shape (), one without elements, and an embedding."""

    def __init__(self, dtype="float32"):
        super().__init__(dtype=dtype)
        self.table = layers.Embedding(5, 2, name="table", dtype=dtype)
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale")
        self.none = self.add_weight(shape=(0, 3), name="none")
        self.head = layers.Dense(1, name="head", dtype=dtype)

    def call(self, inputs):
        pooled = keras.ops.mean(self.table(inputs), axis=1)
        return self.head(pooled) * self.scale + keras.ops.sum(self.none)


ALL = {
    **{name: (lambda make=make: make(0.01)) for name, (make, _) in BOUNDED.items()},
    "PercentileClipping": lambda: hooks.PercentileClipping(50),
    "ZScoreClipping": lambda: hooks.ZScoreClipping(0.1, num_warmup_steps=1),
    "SkipNonFinite": lambda: hooks.SkipNonFinite(3),
    "SkipSpikes": lambda: hooks.SkipSpikes(1e6, num_warmup_steps=1),
    "ZeroNonFinite": lambda: hooks.ZeroNonFinite(),
    "GradientScaling": lambda: hooks.GradientScaling(0.5),
    "GradientNoise": lambda: hooks.GradientNoise(0.1, seed=1),
    "Centralization": lambda: hooks.Centralization(),
    "LearningRateMultiplier": lambda: hooks.LearningRateMultiplier(0.5),
    "Freezing": lambda: hooks.Freezing("*table*"),
    "GradientMonitor": lambda: hooks.GradientMonitor(True, True),
    "UpdateMonitor": lambda: hooks.UpdateMonitor(True),
    "NoiseScale": lambda: hooks.NoiseScale(),
    "LambdaHook": lambda: hooks.LambdaHook(lambda g, v: 0.5 * g),
}
TOKENS, TARGETS = np.array([[1, 1], [2, 4], [3, 0], [1, 4]]), np.ones((4, 1))


@pytest.mark.filterwarnings("ignore:.* comes before ", "ignore:Gradients do not exist")
@pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        ("graph", "float64"),
        ("update in XLA", "float32"),
        pytest.param("update in XLA", "float64", marks=pytest.mark.slow),
        pytest.param("XLA", "float32", marks=pytest.mark.slow),
        pytest.param("XLA", "float64", marks=pytest.mark.slow),
    ],
)
def test_scalar_and_empty_weights_beside_an_embedding(mode, dtype):
    """All hooks one after the other in one model, against the same in an eager loop."""
    found = []
    for options in (MODES[mode], MODES["eager"]):
        keras.utils.set_random_seed(3)
        model = Odd(dtype)
        model(TOKENS)
        parts = 1 if mode == "update in XLA" and options is MODES[mode] else 2
        made = [make() for name, make in ALL.items() if name != "NoiseScale" or dtype == "float32"]
        made = [h for h in made if parts == 2 or not isinstance(h, hooks.NoiseScale)]
        model.compile(
            keras.optimizers.SGD(0.1), "mse", gradient_hooks=made, micro_batches=parts, **options
        )
        logs = [model.train_on_batch(TOKENS, TARGETS, return_dict=True) for _ in range(2)]
        assert all(np.isfinite(list(entry.values())).all() for entry in logs)
        found.append(model.get_weights())
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("in_xla", [False, True])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 3, 4)])
def test_norms_of_any_shape(shape, in_xla):
    values = np.arange(1.0, 1.0 + np.prod(shape, dtype=int)).reshape(shape).astype("float32")

    def both(v):
        with xla.in_xla() if in_xla else contextlib.nullcontext():
            return norms.joint_norm([v, tf.constant(3.0)]), norms.separate_norms([v])

    joint, separate = tf.function(both, jit_compile=in_xla)(tf.constant(values))
    expected = np.sqrt(np.sum(values.astype("float64") ** 2))
    np.testing.assert_allclose(joint, np.sqrt(expected**2 + 9), rtol=1e-6)
    np.testing.assert_allclose(separate, [expected], rtol=1e-6)


def test_schedules_of_freezing_count_steps():
    model = _line(hooks.Freezing("*", steps=3))
    (freezing,) = model.gradient_hooks
    model.gradient_hooks.prepare(model.trainable_variables, lambda v: None)
    assert [bool(freezing.frozen_positions(0, step)) for step in range(5)] == [
        True, True, True, False, False,
    ]  # fmt: skip
