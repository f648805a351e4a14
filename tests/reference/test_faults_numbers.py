"""Numbers at the edges of their ranges, and wrong ones; each test is named by its fault."""

import math
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_tapefit import TapeModel, backward, hooks

from .support import TOKENS, X, Y, assert_near, assert_same_logs, dense, fit, square, train, weights

DATA = {"x": X, "y": Y}
NO_BOUND = {
    "GlobalNormClipping": lambda bound: hooks.GlobalNormClipping(bound),
    "NormClipping": lambda bound: hooks.NormClipping(bound),
    "NormClipping per layer": lambda bound: hooks.NormClipping(bound, per_layer=True),
    "ValueClipping": lambda bound: hooks.ValueClipping(bound),
    "BlockRMSClipping": lambda bound: hooks.BlockRMSClipping(bound),
    "AdaptiveClipping": lambda bound: hooks.AdaptiveClipping(bound),
}


# --- P1: an infinite bound is no bound


def _unclipped():
    return train(dense, DATA, 8, loss="mse")[0]


@pytest.mark.parametrize("bound", [math.inf, 1e39, np.float64(1e300)])
@pytest.mark.parametrize("hook", NO_BOUND)
def test_P1_no_bound(hook, bound):
    found, _ = train(dense, DATA, 8, loss="mse", gradient_hooks=[NO_BOUND[hook](bound)])
    assert_near(found, _unclipped())


@pytest.mark.parametrize("how", ["assigned", "schedule", "function"])
@pytest.mark.parametrize("hook", ["GlobalNormClipping", "NormClipping"])
def test_P1_no_bound_that_comes_later(hook, how):
    class Schedule(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return tf.where(step < 100, math.inf, 1.0)

    first = {"assigned": 1e-3, "schedule": Schedule(), "function": lambda step: math.inf}[how]
    model, _ = train(
        dense, DATA, 8, loss="mse", gradient_hooks=[NO_BOUND[hook](first)], epochs=1, momentum=0.0
    )
    before = model.get_weights()
    if how == "assigned":
        model.gradient_hooks[0].max_norm = math.inf
        fit(model)
    expected, _ = train(dense, DATA, 8, loss="mse", epochs=1, momentum=0.0)
    if how == "assigned":
        # What a bound of 1e-3 left, and from there what no hook gives.
        expected = dense(keras.Model)
        expected.set_weights(before)
        expected.compile(keras.optimizers.SGD(0.2), "mse")
        fit(expected)
    assert_near(model, expected)


# --- P2: scalars


class Scaled(layers.Layer):
    def build(self, input_shape):
        self.scale = self.add_weight(shape=(), initializer="ones", name="scale")

    def call(self, inputs):
        return inputs * self.scale


def _with_scalar(kind):
    tokens = keras.Input((6,), dtype="int32")
    hidden = layers.Flatten()(layers.Embedding(5, 3, name="e")(tokens))
    return kind(tokens, Scaled(name="s")(layers.Dense(2, name="end")(hidden)))


ON_SCALARS = {
    "LambdaHook": lambda: lambda g, v: g * 0.5,
    "GlobalNormClipping": lambda: hooks.GlobalNormClipping(0.5),
    "NormClipping": lambda: hooks.NormClipping(0.2),
    "NormClipping per layer": lambda: hooks.NormClipping(0.2, per_layer=True),
    "ValueClipping": lambda: hooks.ValueClipping(0.05),
    "BlockRMSClipping": lambda: hooks.BlockRMSClipping(0.05),
    "AdaptiveClipping": lambda: hooks.AdaptiveClipping(0.1),
    "PercentileClipping": lambda: hooks.PercentileClipping(30),
    "ZScoreClipping": lambda: hooks.ZScoreClipping(1.0, num_warmup_steps=2),
    "SkipNonFinite": lambda: hooks.SkipNonFinite(),
    "SkipSpikes": lambda: hooks.SkipSpikes(40.0, num_warmup_steps=2),
    "ZeroNonFinite": lambda: hooks.ZeroNonFinite(),
    "GradientScaling": lambda: hooks.GradientScaling(0.5),
    "GradientNoise": lambda: hooks.GradientNoise(0.1, seed=3),
    "Centralization": lambda: hooks.Centralization(),
    "LearningRateMultiplier": lambda: hooks.LearningRateMultiplier(0.3, targets="s/*"),
    "Freezing": lambda: hooks.Freezing("s/*", epochs=1),
    "GradientMonitor": lambda: hooks.GradientMonitor(per_variable=True),
    "UpdateMonitor": lambda: hooks.UpdateMonitor(per_variable=True),
}
TOKEN_DATA = {"x": TOKENS, "y": Y}


@pytest.mark.parametrize("hook", ON_SCALARS)
def test_P2_a_scalar_weight_beside_an_embedding(hook):
    """The update in XLA is that of the eager loop."""
    runs = [
        train(
            _with_scalar, TOKEN_DATA, 16, loss="mse", gradient_hooks=[ON_SCALARS[hook]()], **options
        )
        for options in ({"run_eagerly": True, "jit_compile": False}, {"jit_compile": "update"}, {})
    ]
    for found, logs in runs[1:]:
        assert_near(found, runs[0][0], 2e-6)
        assert_same_logs(logs, runs[0][1], 1e-4)


@pytest.mark.parametrize("options", [{}, {"jit_compile": "update"}])
def test_P2_the_norm_in_numpy(options):
    found, _ = train(
        _with_scalar,
        TOKEN_DATA,
        16,
        loss="mse",
        momentum=0.0,
        gradient_hooks=[hooks.GlobalNormClipping(0.1)],
        **options,
    )
    keras.utils.set_random_seed(5)
    expected = _with_scalar(keras.Model)
    for i in [0, 16, 32] * 2:
        with tf.GradientTape() as tape:
            loss = square(Y[i : i + 16], expected(TOKENS[i : i + 16]))
        variables = expected.trainable_variables
        gradients = tape.gradient(loss, [v.value for v in variables])
        dense_ones = [np.asarray(tf.convert_to_tensor(g), "float64") for g in gradients]
        norm = math.sqrt(sum((g**2).sum() for g in dense_ones))
        for v, g in zip(variables, dense_ones, strict=True):
            v.assign(v.numpy() - 0.2 * g * 0.1 / max(norm, 0.1))
    assert_near(found, expected)


# --- P3: from the smallest number to the largest


def _applied(hook, gradients, dtype):
    """Returns what `hook` makes of gradients: what SGD with rate 1 takes off."""
    keras.utils.set_random_seed(5)
    inputs = keras.Input((len(gradients),), dtype=dtype)
    layer = layers.Dense(1, use_bias=False, kernel_initializer="zeros", dtype=dtype)
    model = TapeModel(inputs, layer(inputs))
    model.compile(keras.optimizers.SGD(1.0), "mse", gradient_hooks=[hook])
    model.optimizer.build(model.trainable_variables)
    (variable,) = model.trainable_variables
    model.apply_gradients([(tf.constant(gradients, dtype)[:, None], variable)])
    return -variable.numpy()[:, 0].astype("float64")


SIZES = {
    "float32": [3e38, 1e30, 1e19, 1.0, 1e-19, 1e-30, 1e-37],
    "float64": [1e308, 1e160, 1.0, 1e-160, 1e-307],
}


@pytest.mark.parametrize(
    ("dtype", "size"), [(dtype, size) for dtype, sizes in SIZES.items() for size in sizes]
)
@pytest.mark.parametrize("bound", [1.0, 1e-20])
@pytest.mark.parametrize("hook", ["GlobalNormClipping", "NormClipping", "NormClipping per layer"])
def test_P3_clipping_keeps_direction_and_norm(hook, dtype, size, bound):
    """In Python numbers: the gradient is `size · (0.6, -0.8)`, of norm `size`."""
    found = _applied(NO_BOUND[hook](bound), [0.6 * size, -0.8 * size], dtype)
    norm = min(size, bound)
    # Bounds are float32, and so is what is lost to them.
    np.testing.assert_allclose(found / norm, [0.6, -0.8], rtol=2e-6)


@pytest.mark.parametrize("size", [1e-45, 1e-42])
def test_P3_denormal_numbers(size):
    """Devices may take them for zero; nothing may come of them that is not a number."""
    found = _applied(hooks.GlobalNormClipping(1.0), [size, 0.0], "float32")
    assert found[1] == 0.0 and 0.0 <= found[0] <= 2 * size


def test_P3_many_large_elements():
    found = _applied(hooks.GlobalNormClipping(1.0), [1e38] * 100, "float32")
    np.testing.assert_allclose(found, [0.1] * 100, rtol=1e-5)


# --- P4: values that come from the device


class Fixed(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule that gives one value."""

    def __init__(self, value):
        self.value = value

    def __call__(self, step):
        return tf.constant(self.value, tf.float32)


WITH_NUMBER = {
    "GlobalNormClipping": hooks.GlobalNormClipping,
    "NormClipping": hooks.NormClipping,
    "ValueClipping": hooks.ValueClipping,
    "BlockRMSClipping": hooks.BlockRMSClipping,
    "AdaptiveClipping": hooks.AdaptiveClipping,
    "GradientNoise": lambda value: hooks.GradientNoise(value, seed=1),
    "LearningRateMultiplier": lambda value: hooks.LearningRateMultiplier(value, targets="*"),
    "ZScoreClipping": lambda value: hooks.ZScoreClipping(value, num_warmup_steps=2),
    "PercentileClipping": lambda value: hooks.PercentileClipping(value, history=4),
}


@pytest.mark.parametrize("value", [-1.0, math.nan, 0.0])
@pytest.mark.parametrize("how", ["schedule", "function"])
@pytest.mark.parametrize("hook", WITH_NUMBER)
def test_P4_a_value_out_of_range(hook, how, value):
    """Refused, or clamped, or a step that is not made: never uphill, never NaN."""
    given = Fixed(value) if how == "schedule" else lambda step: tf.constant(value)
    keras.utils.set_random_seed(5)
    model = dense()
    start = model.get_weights()
    try:
        model.compile(keras.optimizers.SGD(0.01), "mse", gradient_hooks=[WITH_NUMBER[hook](given)])
        model.train_on_batch(X, Y)
    except ValueError as error:
        assert "Received" in str(error)
        for before, after in zip(start, model.get_weights(), strict=True):
            np.testing.assert_array_equal(after, before)
        return
    before, after = (_loss(w) for w in (start, model.get_weights()))
    assert np.isfinite(weights(model)).all()
    # Noise goes anywhere.
    assert after <= before + 1e-7 or hook == "GradientNoise"


def _loss(values):
    stock = dense(keras.Model)
    stock.set_weights(values)
    return float(square(Y, stock(X)))


@pytest.mark.parametrize("hook", ["GlobalNormClipping", "NormClipping", "ValueClipping"])
def test_P4_a_bound_of_zero_is_none(hook):
    """As documented: with a number that cannot be used a hook does nothing."""
    keras.utils.set_random_seed(5)
    model, plain = dense(), dense(keras.Model)
    plain.set_weights(model.get_weights())
    model.compile(
        keras.optimizers.SGD(0.1), "mse", gradient_hooks=[WITH_NUMBER[hook](lambda step: 0.0)]
    )
    plain.compile(keras.optimizers.SGD(0.1), "mse")
    for each in (model, plain):
        each.train_on_batch(X, Y)
    np.testing.assert_allclose(weights(model), weights(plain), rtol=1e-6, atol=1e-7)


# --- P5: float64, and shapes that crash TensorFlow


def _double(kind=TapeModel):
    inputs = keras.Input((6,), dtype="float64")
    hidden = layers.Dense(5, activation="tanh", name="a", dtype="float64")(inputs)
    return kind(inputs, layers.Dense(2, name="b", dtype="float64")(hidden))


def test_P5_examples_are_clipped_in_float64():
    found, _ = train(
        _double,
        {"x": X[:8].astype("float64"), "y": Y[:8].astype("float64")},
        8,
        loss=keras.losses.MeanSquaredError(dtype="float64"),
        epochs=1,
        momentum=0.0,
        backward=backward.PerExampleClipping(0.3, noise_multiplier=0.0),
    )
    keras.utils.set_random_seed(5)
    expected = _double(keras.Model)
    variables = expected.trainable_variables
    total = [np.zeros(v.shape) for v in variables]
    for i in range(8):
        with tf.GradientTape() as tape:
            loss = square(Y[i : i + 1], expected(X[i : i + 1].astype("float64")))
        gradients = [g.numpy() for g in tape.gradient(loss, [v.value for v in variables])]
        norm = math.sqrt(sum((g**2).sum() for g in gradients))
        total = [t + g * min(1.0, 0.3 / norm) / 8 for t, g in zip(total, gradients, strict=True)]
    for v, g in zip(variables, total, strict=True):
        v.assign(v.numpy() - 0.2 * g)
    assert_near(found, expected)


OF_ANY_MODEL = [n for n in ON_SCALARS if n not in ("LearningRateMultiplier", "Freezing")]


@pytest.mark.parametrize("name", ["NoiseScale", *OF_ANY_MODEL])
def test_P5_float64_with_micro_batches(name):
    hook = hooks.NoiseScale() if name == "NoiseScale" else ON_SCALARS[name]()
    data = {"x": X.astype("float64"), "y": Y.astype("float64")}
    loss = keras.losses.MeanSquaredError(dtype="float64")
    found, logs = train(_double, data, 8, loss=loss, gradient_hooks=[hook], micro_batches=2)
    assert np.isfinite(weights(found)).all()
    assert np.isfinite(logs["loss"]).all()
    if name in ("NoiseScale", "GradientMonitor", "UpdateMonitor", "SkipNonFinite"):
        expected, right = train(_double, data, 8, kind=keras.Model, loss=loss)
        assert_near(found, expected)
        assert_same_logs(logs, right)


BLOCK = """
import keras, numpy as np
from keras import layers
from keras_tapefit import TapeModel, backward
keras.utils.set_random_seed(1)
inputs = keras.Input((64, 128))
hidden = layers.LayerNormalization()(inputs + layers.MultiHeadAttention(4, 32)(inputs, inputs))
hidden = hidden + layers.Dense(128)(layers.Dense(256, activation="relu")(hidden))
outputs = layers.Dense(2)(layers.GlobalAveragePooling1D()(hidden))
model = TapeModel(inputs, outputs)
model.compile("sgd", "mse", backward=backward.PerExampleClipping(1.0))
x = np.random.default_rng(0).normal(size=(16, 64, 128)).astype("float32")
model.train_on_batch(x, np.zeros((16, 2), "float32"))
assert all(np.isfinite(w).all() for w in model.get_weights())
print("trained")
"""

pytestmark = [pytest.mark.slow, pytest.mark.long]


def test_P5b_examples_of_a_transformer_block():
    """In a process of its own: what fails here kills it."""
    done = subprocess.run(
        [sys.executable, "-c", BLOCK], capture_output=True, text=True, timeout=240, check=False
    )
    assert "trained" in done.stdout, (done.returncode, done.stderr[-2000:])


# --- P6, P7


@pytest.mark.filterwarnings("ignore:All of the model.s weights are frozen:UserWarning")
@pytest.mark.parametrize("options", [{}, {"steps_per_execution": 2}, {"run_eagerly": True}])
def test_P6_frozen_altogether_for_some_steps(options):
    """Of six steps the first four train nothing."""
    keras.utils.set_random_seed(5)
    model, expected = dense(), dense(keras.Model)
    expected.set_weights(model.get_weights())
    for each, more in (
        (model, {"gradient_hooks": [hooks.Freezing("*", steps=4)], **options}),
        (expected, {}),
    ):
        each.compile(keras.optimizers.SGD(0.2, momentum=0.9), "mse", **more)
    fit(model)
    fit(expected, X[32:], Y[32:])
    assert_near(model, expected)


@pytest.mark.parametrize("name", ["loss", "mae"])
def test_P7_a_log_entry_of_the_models_own(name):
    """Refused, or kept apart: `EarlyStopping` must not act on a hook's number."""

    class Reporting(hooks.GradientHook):
        def apply(self, gradients):
            self.report(name, 1234.0)
            return gradients

    _, right = train(dense, DATA, 8, kind=keras.Model, loss="mse", metrics=["mae"])
    try:
        _, logs = train(dense, DATA, 8, loss="mse", metrics=["mae"], gradient_hooks=[Reporting()])
    except ValueError as error:
        assert name in str(error)
        return
    assert_same_logs(logs, right)
