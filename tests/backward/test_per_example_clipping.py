"""DP-SGD against a loop over examples in float64."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from passes import watched
from training import BATCH, NUM_STEPS, assert_same_weights, by_hand, trained

from keras_tapefit import TapeModel, TapeSequential, backward, hooks

RNG = np.random.default_rng(9)
X = RNG.normal(size=(BATCH * NUM_STEPS, 3)).astype("float32")
Y = RNG.normal(size=(BATCH * NUM_STEPS, 2)).astype("float32")


class Linear(TapeModel):
    """`L_i = w·x_i`: the gradient of an example is the example."""

    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1],), initializer="zeros", name="w")

    def call(self, x):
        return tf.linalg.matvec(x, self.w)


def linear_gradient(x, **kwargs):
    model = Linear()
    model.compile("sgd", lambda y, p: p, backward=backward.PerExampleClipping(**kwargs))
    x = np.asarray(x, "float32")
    (gradient,) = model.compute_gradients(x, np.zeros(len(x), "float32")).values()
    return gradient.numpy()


def test_worked_number():
    x = [[3.0, 4.0], [0.3, 0.4]]
    np.testing.assert_allclose(linear_gradient(x, max_norm=1.0), [0.45, 0.6], rtol=1e-6)
    expected = linear_gradient(x, max_norm=1.0, expected_batch_size=10)
    np.testing.assert_allclose(expected, [0.09, 0.12], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_example_that_is_not_finite_counts_as_zero(bad):
    x = [[3.0, 4.0], [bad, 0.0], [0.3, 0.4]]
    np.testing.assert_allclose(linear_gradient(x, max_norm=1.0), [0.3, 0.4], rtol=1e-6)


@pytest.mark.parametrize("size", [1e25, 1e-25])
def test_norms_neither_overflow_nor_underflow(size):
    x = np.array([[3.0, 4.0], [0.3, 0.4]]) * size
    found = linear_gradient(x, max_norm=size)
    np.testing.assert_allclose(found / size, [0.45, 0.6], rtol=1e-5)


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 5, 7, 100])
def test_chunks(chunk_size):
    x = RNG.normal(size=(7, 4)) * 3
    factors = 1 / np.maximum(1, np.linalg.norm(x, axis=1) / 2.0)
    truth = (x * factors[:, None]).sum(0) / 7
    found = linear_gradient(x, max_norm=2.0, chunk_size=chunk_size)
    np.testing.assert_allclose(found, truth, rtol=1e-5, atol=1e-7)


def test_noise_is_of_the_given_size_once_and_reproducible():
    x = np.zeros((5, 20000))
    kwargs = {"max_norm": 3.0, "noise_multiplier": 2.0, "expected_batch_size": 10}
    draw = linear_gradient(x, seed=1, **kwargs)
    assert draw.std() == pytest.approx(0.6, rel=0.02)
    assert abs(draw.mean()) < 0.02
    np.testing.assert_array_equal(draw, linear_gradient(x, seed=1, chunk_size=2, **kwargs))
    assert np.abs(np.corrcoef(draw, linear_gradient(x, seed=2, **kwargs))[0, 1]) < 0.05
    assert np.abs(np.corrcoef(draw, linear_gradient(x, **kwargs))[0, 1]) < 0.05


def make():
    return TapeSequential(
        [
            keras.Input((3,)),
            layers.Dense(6, activation="tanh", kernel_regularizer="l2"),
            layers.LayerNormalization(),
            layers.Dense(2),
        ]
    )


def loop(max_norm, lot):
    """One backward pass an example, and clipped sums in float64."""

    def gradients(model, x, y, step):
        total = None
        for i in range(len(x)):
            with tf.GradientTape() as tape:
                y_pred = model(x[i : i + 1], training=True)
                loss = tf.reduce_mean(tf.square(y[i : i + 1] - y_pred)) + sum(model.losses)
            found = tape.gradient(loss, model.trainable_variables)
            found = [tf.convert_to_tensor(g).numpy().astype("float64") for g in found]
            norm = np.sqrt(sum(np.sum(g**2) for g in found))
            found = [g / max(1, norm / max_norm) for g in found]
            total = found if total is None else [a + b for a, b in zip(total, found, strict=True)]
        return [tf.constant(g / lot, tf.float32) for g in total]

    return gradients


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_equals_a_loop_in_every_mode(mode, chunk_size):
    method = backward.PerExampleClipping(0.7, expected_batch_size=10, chunk_size=chunk_size)
    model = trained(mode, make, X, Y, backward=method)
    assert_same_weights(model, by_hand(make, loop(0.7, 10), X, Y))


def test_noise_is_the_same_in_every_mode(mode):
    """On replicas too it comes once."""

    def method():
        return backward.PerExampleClipping(0.7, noise_multiplier=1.0, chunk_size=4, seed=5)

    model = trained(mode, make, X, Y, backward=method())
    assert_same_weights(model, trained("graph", make, X, Y, backward=method()), atol=1e-5)
    quiet = trained("graph", make, X, Y, backward=backward.PerExampleClipping(0.7))
    assert np.abs(model.get_weights()[0] - quiet.get_weights()[0]).max() > 1e-2


def test_a_last_batch_that_is_not_full():
    # Shapes are unknown in the graph.
    method = backward.PerExampleClipping(0.7, chunk_size=3)
    keras.utils.set_random_seed(0)
    model = make()
    model.compile(keras.optimizers.SGD(0.1), "mse", backward=method, jit_compile=False)
    model.fit(X[:11], Y[:11], batch_size=8, shuffle=False, verbose=0)
    keras.utils.set_random_seed(0)
    other = make()
    for part in (slice(0, 8), slice(8, 11)):
        found = loop(0.7, part.stop - part.start)(other, X[part], Y[part], 0)
        for v, g in zip(other.trainable_variables, found, strict=True):
            v.assign_sub(0.1 * g)
    assert_same_weights(model, other)


def test_a_chunk_begins_after_the_one_before_has_ended():
    """Else the gradients of more examples would be in memory."""
    order = []
    through = watched(order)

    class Watched(Linear):
        def call(self, x):
            return through(super().call(x))

    model = Watched()
    method = backward.PerExampleClipping(1.0, chunk_size=2)
    model.compile("sgd", lambda y, p: p, backward=method, jit_compile=False)
    model.build((None, 1))
    model.w.assign([1.0])
    x = np.arange(6, dtype="float32")[:, None]
    model.fit(x, np.zeros(6), batch_size=6, shuffle=False, verbose=0)
    for chunk in range(3):
        first = min(order.index(("forward", example)) for example in (2 * chunk, 2 * chunk + 1))
        ended = [name for name, _ in order[:first]].count("backward")
        assert ended >= 2 * chunk, order


def test_without_a_bound_it_is_the_gradient():
    keras.utils.set_random_seed(0)
    model = make()
    weight = RNG.uniform(size=BATCH).astype("float32")
    model.compile("sgd", "mse")
    plain = model.compute_gradients(X[:BATCH], Y[:BATCH], weight)
    model.compile("sgd", "mse", backward=backward.PerExampleClipping(1e6, chunk_size=3))
    found = model.compute_gradients(X[:BATCH], Y[:BATCH], weight)
    for one, other in zip(plain.values(), found.values(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def _series():
    return [
        keras.Input((3,)),
        layers.Reshape((3, 1)),
        layers.Conv1D(2, 2),
        layers.GroupNormalization(1),
        layers.LSTM(2, unroll=True),
        layers.Dense(2),
    ]


def _grids():
    return [
        keras.Input((3,)),
        layers.Dense(16),
        layers.Reshape((4, 4, 1)),
        layers.Conv2D(2, 3, activation="relu"),
        layers.MaxPooling2D(),
        layers.Flatten(),
        layers.Dense(2),
    ]


def _ids():
    return [
        keras.Input((3,)),
        layers.Lambda(lambda x: tf.cast(x > 0, "int32"), output_shape=(3,)),
        layers.Embedding(4, 3),
        layers.GlobalAveragePooling1D(),
        layers.Dense(2),
    ]


@pytest.mark.parametrize("stack", [_series, _grids, _ids])
@pytest.mark.parametrize("mode", ["graph", pytest.param("xla", marks=pytest.mark.slow)])
def test_layers(mode, stack):
    method = backward.PerExampleClipping(0.05, chunk_size=4)
    build = lambda: TapeSequential(stack())  # noqa: E731
    model = trained(mode, build, X, Y, backward=method)

    assert_same_weights(model, by_hand(build, loop(0.05, BATCH), X, Y))


def test_dropout_differs_between_examples_and_seeds_advance_once(mode):
    def build():
        return TapeSequential(
            [
                keras.Input((3,)),
                layers.Dropout(0.5, seed=1),
                layers.Dense(2, kernel_initializer="zeros"),
            ]
        )

    method = backward.PerExampleClipping(1e6, chunk_size=3)
    model = trained(mode, build, X, Y, backward=method, metrics=["mae"])
    (seed,) = [v for v in model.non_trainable_variables if "seed" in v.path]
    assert int(seed.numpy()[1]) == NUM_STEPS
    ones = np.ones((64, 3), "float32")
    gradient = model.compute_gradients(ones, ones[:, :2] * 1e3)["dense/kernel"].numpy()
    # One mask for all would leave each row of the kernel with all or nothing.
    shares = gradient[:, 0] / gradient[:, 0].sum()
    assert (shares > 0.15).all()


def test_logs_are_those_of_the_model():
    kwargs = {"metrics": ["mae"], "run_eagerly": False}
    method = backward.PerExampleClipping(1e6)
    model = trained("graph", make, X, Y, backward=method, **kwargs)
    plain = trained("graph", make, X, Y, **kwargs)
    for name, values in plain.history_of_fit.items():
        np.testing.assert_allclose(model.history_of_fit[name], values, rtol=1e-5)


def test_overflow_of_the_loss_scale_skips_the_step():
    def fit(scale, x):
        keras.utils.set_random_seed(0)
        keras.config.set_dtype_policy("mixed_float16")
        try:
            model = TapeSequential(
                [keras.Input((3,)), layers.Dense(4), layers.Dense(2, dtype="float32")]
            )
        finally:
            keras.config.set_dtype_policy("float32")
        inner = keras.optimizers.SGD(0.1)
        optimizer = keras.optimizers.LossScaleOptimizer(inner, initial_scale=scale)
        model.compile(
            optimizer,
            "mse",
            backward=backward.PerExampleClipping(1.0),
            jit_compile=False,
            gradient_hooks=[hooks.GradientMonitor()],
        )
        before = model.get_weights()
        model.fit(x, Y[:BATCH], batch_size=BATCH, verbose=0)
        return before, model.get_weights(), float(optimizer.dynamic_scale.numpy())

    before, after, scale = fit(2.0**30, X[:BATCH])
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)
    assert scale == 2.0**29
    # Bad data is no overflow: the step counts, without the example.
    x = X[:BATCH].copy()
    x[2] = np.nan
    before, after, scale = fit(2.0**10, x)
    assert scale == 2.0**10
    assert all(np.isfinite(w).all() for w in after)
    assert np.abs(after[0] - before[0]).max() > 0


def test_numbers_are_live_without_a_retrace():
    method = backward.PerExampleClipping(1e6)
    model = make()
    model.compile(keras.optimizers.SGD(0.1), "mse", backward=method, jit_compile=False)
    start = model.get_weights()

    def moved(max_norm):
        model.set_weights(start)
        method.max_norm = max_norm
        model.fit(X, Y, batch_size=len(X), verbose=0)
        return max(np.abs(a - b).max() for a, b in zip(start, model.get_weights(), strict=True))

    far = moved(1e6)
    function = model.train_function
    assert moved(1e-3) < 1e-3 < far
    assert model.train_function is function and len(function._traces) == 1


@pytest.mark.parametrize(
    "layer, name",
    [
        (lambda: layers.BatchNormalization(), "BatchNormalization"),
        (lambda: layers.SimpleRNN(2, stateful=True, return_sequences=True), "SimpleRNN"),
    ],
)
def test_layers_that_mix_examples_are_refused(layer, name):
    model = TapeSequential(
        [keras.Input(batch_shape=(BATCH, 3, 2)), layer(), layers.Flatten(), layers.Dense(2)]
    )
    model.compile("sgd", "mse", backward=backward.PerExampleClipping(1.0))
    with pytest.raises(ValueError, match=rf"the layer .* \({name}\) mixes them"):
        model.fit(np.zeros((BATCH, 3, 2), "float32"), Y[:BATCH], verbose=0)


def test_frozen_batch_normalization_is_no_mixing():
    norm = layers.BatchNormalization()
    model = TapeSequential([keras.Input((3,)), norm, layers.Dense(2)])
    norm.trainable = False
    model.compile("sgd", "mse", backward=backward.PerExampleClipping(1.0))
    model.fit(X, Y, batch_size=BATCH, verbose=0)


def test_micro_batches_are_refused():
    model = make()
    model.compile("sgd", "mse", backward=backward.PerExampleClipping(1.0), micro_batches=2)
    with pytest.raises(ValueError, match="needs the whole batch at once, .* `chunk_size`"):
        model.fit(X, Y, verbose=0)


def test_config():
    arguments = {
        "max_norm": 0.5,
        "noise_multiplier": 1.5,
        "expected_batch_size": 64,
        "chunk_size": 8,
        "seed": 3,
    }
    method = backward.PerExampleClipping(**arguments)
    assert method.get_config() == arguments
    restored = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(method))
    assert type(restored) is backward.PerExampleClipping and restored.get_config() == arguments


@pytest.mark.parametrize(
    "kwargs, error, text",
    [
        ({"max_norm": 0}, ValueError, "`max_norm` must be a positive number. Received: max_norm=0"),
        ({"max_norm": None}, TypeError, "`max_norm` must be a number. Received: max_norm=None"),
        ({"noise_multiplier": -1}, ValueError, "`noise_multiplier` must be zero or a positive"),
        ({"expected_batch_size": 0}, ValueError, "`expected_batch_size` must be at least 1"),
        (
            {"chunk_size": 2.5},
            TypeError,
            "`chunk_size` must be an integer. Received: ",
        ),
        ({"seed": "a"}, TypeError, "`seed` must be an integer. Received: seed='a'"),
    ],
)
def test_errors(kwargs, error, text):
    with pytest.raises(error, match=text):
        backward.PerExampleClipping(**{"max_norm": 1.0, **kwargs})
