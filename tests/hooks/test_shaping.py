"""Scaling, noise and centralization."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_tapefit import TapeSequential, hooks
from keras_tapefit.gradients.units import unit_axes

RNG = np.random.default_rng(11)


def test_scaling(bench):
    first, none = bench(hooks.GradientScaling(-0.5), [(2,), (1,)])([2.0, 4.0], None)
    np.testing.assert_array_equal(first, [-1.0, -2.0])
    assert none is None


def test_noise_has_the_annealed_standard_deviation(bench):
    run = bench(hooks.GradientNoise(stddev=0.5, seed=1), [(300, 300)])
    zero = tf.zeros((300, 300))
    for step in (0, 1, 9):
        run.index = step
        (noise,) = run(zero)
        expected = 0.5 / (1 + step) ** (0.55 / 2)
        # 90,000 draws: the standard error of the deviation is 0.24 %.
        assert noise.std() == pytest.approx(expected, rel=0.01)
        assert abs(noise.mean()) < 4 * expected / 300
    constant = bench(hooks.GradientNoise(stddev=0.5, decay=0, seed=1), [(300, 300)])
    constant.index = 9
    assert constant(zero)[0].std() == pytest.approx(0.5, rel=0.01)


def test_noise_is_normal_and_independent(bench):
    run = bench(hooks.GradientNoise(stddev=1.0, seed=2), [(200, 200), (200, 200)])
    zero = tf.zeros((200, 200))
    first, second = run(zero, zero)
    later, _ = run(zero, zero)
    for a, b in ((first, second), (first, later)):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.02
    within = [np.mean(np.abs(first) < k) for k in (1, 2, 3)]
    np.testing.assert_allclose(within, [0.6827, 0.9545, 0.9973], atol=0.01)


def test_noise_follows_the_seed_and_the_step(bench):
    def draw(seed, step):
        run = bench(hooks.GradientNoise(1.0, decay=0, seed=seed), [(5,)])
        run.index = step
        return run(tf.zeros(5))[0]

    np.testing.assert_array_equal(draw(0, 3), draw(0, 3))
    for other in ((1, 3), (-1, 3), (0, 4), (2**40, 3), (None, 3)):
        assert not np.array_equal(draw(0, 3), draw(*other))
    assert not np.array_equal(draw(None, 0), draw(None, 0))


def test_noise_makes_sparse_gradients_dense_and_keeps_half_precision(bench):
    table = keras.Variable(np.zeros((4, 2)), name="table")
    half = keras.Variable(np.zeros(3), dtype="float16", name="half")
    slices = tf.IndexedSlices(tf.ones((1, 2)), tf.constant([1]), tf.constant([4, 2]))
    run = bench(hooks.GradientNoise(1.0, seed=0), [table, half])
    first, second = run(slices, tf.zeros(3, tf.float16))
    assert (first != 0).all() and second.dtype == np.float16


def _noisy_model():
    keras.utils.set_random_seed(3)
    model = TapeSequential([keras.Input((3,)), layers.Dense(4), layers.Dense(1)])
    hook = hooks.GradientNoise(0.3)  # the seed is drawn, and saved
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", gradient_hooks=[hook])
    return model


def test_a_resumed_run_draws_what_the_uninterrupted_one_would(tmp_path):
    x, y = RNG.normal(size=(24, 3)), RNG.normal(size=(24, 1))
    model = _noisy_model()
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    model.save(tmp_path / "half.keras")
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    resumed = keras.models.load_model(tmp_path / "half.keras")
    resumed.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    for a, b in zip(model.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_centralization_worked_number(bench):
    layer = layers.Dense(3)
    layer.build((None, 2))
    kernel, bias = bench(hooks.Centralization(), layer)([[0.0, 1, 2], [3, 4, 5]], [1.0, 2, 3])
    np.testing.assert_array_equal(kernel, [[-1.5] * 3, [1.5] * 3])
    np.testing.assert_array_equal(bias, [1.0, 2.0, 3.0])


LAYERS = {
    "Conv1D": (lambda: layers.Conv1D(3, 2), (6, 4)),
    "Conv2D grouped": (lambda: layers.Conv2D(4, 2, groups=2), (6, 6, 4)),
    "Conv2DTranspose": (lambda: layers.Conv2DTranspose(3, 2), (5, 5, 4)),
    "DepthwiseConv2D": (lambda: layers.DepthwiseConv2D(2, depth_multiplier=3), (5, 5, 4)),
    "SeparableConv2D": (lambda: layers.SeparableConv2D(3, 2), (5, 5, 4)),
    "MultiHeadAttention": (lambda: layers.MultiHeadAttention(2, 3), None),
    "LSTM": (lambda: layers.LSTM(3), (5, 4)),
    "Embedding": (lambda: layers.Embedding(5, 3), ()),
    "LayerNormalization": (lambda: layers.LayerNormalization(axis=(1, 2)), (2, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_centralization_of_every_layer(bench, name):
    make, shape = LAYERS[name]
    layer = make()
    if shape is None:
        layer(np.zeros((1, 3, 4)), np.zeros((1, 3, 4)))
    else:
        layer.build((None, *shape))
    units, variables = unit_axes(layer), layer.trainable_variables
    gradients = [RNG.normal(size=v.shape).astype("float32") for v in variables]
    results = bench(hooks.Centralization(), layer)(*map(tf.constant, gradients))
    for variable, gradient, result in zip(variables, gradients, results, strict=True):
        unit = units[id(variable)]
        assert unit.is_kernel == variable.name.endswith("kernel")
        mean = gradient.mean(unit.axes, keepdims=True, dtype="float64") if unit.is_kernel else 0
        np.testing.assert_allclose(result, gradient - mean, rtol=1e-5, atol=1e-6)


def test_centralization_leaves_the_sparse_gradient_of_an_embedding_sparse(bench):
    layer = layers.Embedding(4, 2)
    layer.build(())
    run = bench(hooks.Centralization(), layer)
    slices = tf.IndexedSlices(tf.ones((1, 2)), tf.constant([1]), tf.constant([4, 2]))
    np.testing.assert_array_equal(run(slices)[0], [[0, 0], [1, 1], [0, 0], [0, 0]])


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: hooks.GradientNoise(-1.0), ValueError, "`stddev` must be zero or a positive num"),
        (lambda: hooks.GradientNoise(1.0, decay=-1), ValueError, "`decay` must be zero or a pos"),
        (lambda: hooks.GradientNoise(1.0, seed=0.5), TypeError, "`seed` must be an integer or N"),
        (lambda: hooks.GradientNoise(1.0, seed=True), TypeError, "Received: seed=True"),
        (lambda: hooks.GradientScaling("0.1"), TypeError, "`factor` must be a number, a `keras"),
        (lambda: hooks.Centralization(targets=3), TypeError, "`targets` must be a layer"),
        (lambda: hooks.Centralization(name=3), TypeError, "`name` must be a string. Rec"),
        (lambda: hooks.Centralization(name=""), TypeError, "`name` must be a string. Rec"),
    ],
)
def test_wrong_arguments(make, error, text):
    with pytest.raises(error, match=text):
        make()
