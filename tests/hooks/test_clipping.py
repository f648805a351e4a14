"""Clipping against worked numbers and float64 NumPy."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from keras_tapefit import TapeModel, hooks
from keras_tapefit.gradients.units import unit_axes

RNG = np.random.default_rng(3)


def _norm(*arrays):
    return np.sqrt(sum(np.sum(np.asarray(a, "float64") ** 2) for a in arrays))


def test_global_norm_worked_number(bench):
    run = bench(hooks.GlobalNormClipping(1.0), [(2,), (1,)])
    first, second = run([3.0, 4.0], [12.0])
    np.testing.assert_allclose(first, [0.230769, 0.307692], rtol=2e-6)
    np.testing.assert_allclose(second, [0.923077], rtol=2e-6)


@pytest.mark.parametrize(
    "hook",
    [
        hooks.GlobalNormClipping(13.0),
        hooks.NormClipping(12.0),
        hooks.NormClipping(13.0, per_layer=True),
        hooks.ValueClipping(12.0),
        hooks.BlockRMSClipping(12.0),
    ],
    ids=lambda hook: type(hook).__name__,
)
def test_gradients_at_the_bound_stay_bit_for_bit(bench, hook):
    first, second = bench(hook, [(2,), (1,)])([3.0, 4.0], [12.0])
    np.testing.assert_array_equal(first, [3.0, 4.0])
    np.testing.assert_array_equal(second, [12.0])


@pytest.mark.parametrize("size", [1e20, 1e37, 1e-20])
def test_global_norm_of_extreme_gradients(bench, size):
    run = bench(hooks.GlobalNormClipping(1e-30 if size < 1 else 1.0), [(2,), (1,)])
    first, second = run([3 * size / 13, 4 * size / 13], [12 * size / 13])
    np.testing.assert_allclose(_norm(first, second), run.hook.max_norm, rtol=1e-6)


def test_norms_are_of_each_variable(bench):
    first, second = bench(hooks.NormClipping(1.0), [(2,), (1,)])([3.0, 4.0], [0.5])
    np.testing.assert_allclose(first, [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(second, [0.5])


def test_norm_of_a_layer_is_joint(bench):
    layer = layers.Dense(1)
    layer.build((None, 2))
    alone = keras.Variable([0.0], name="alone")
    run = bench(hooks.NormClipping(1.0, per_layer=True), [layer.kernel, layer.bias, alone])
    kernel, bias, other = run([[3.0], [4.0]], [12.0], [0.5])
    np.testing.assert_allclose(kernel, [[3 / 13], [4 / 13]], rtol=1e-6)
    np.testing.assert_allclose(bias, [12 / 13], rtol=1e-6)
    np.testing.assert_array_equal(other, [0.5])


def test_layers_of_one_name_are_two_layers():
    class Twins(TapeModel):
        def __init__(self):
            super().__init__()
            self.one = layers.Dense(1, name="twin")
            self.two = layers.Dense(1, name="twin")

        def call(self, x):
            return self.one(x) + 3.0 * self.two(x)

    model = Twins()
    x = np.array([[3.0, 4.0]])
    model(x)
    assert len({v.path for v in model.variables}) == 2
    model.compile(keras.optimizers.SGD(1.0), "mae")
    before = model.get_weights()
    model.register_gradient_hook(hooks.NormClipping(1.0, per_layer=True))
    model.train_on_batch(x, np.array([[-1000.0]]))
    moved = [b - a for a, b in zip(model.get_weights(), before, strict=True)]
    # Kernel [3, 4] and bias [1] of the one, three times that of the other.
    for kernel, bias in (moved[:2], moved[2:]):
        np.testing.assert_allclose(kernel, [[3 / 26**0.5], [4 / 26**0.5]], rtol=1e-5)
        np.testing.assert_allclose(bias, [1 / 26**0.5], rtol=1e-5)


def test_value(bench):
    (values,) = bench(hooks.ValueClipping(2.0), [(4,)])([-3.0, -1.0, 2.0, 9.0])
    np.testing.assert_array_equal(values, [-2.0, -1.0, 2.0, 2.0])


def test_block_rms(bench):
    gradient = RNG.normal(size=(4, 3)).astype("float32")
    rms = np.sqrt(np.mean(gradient.astype("float64") ** 2))
    (result,) = bench(hooks.BlockRMSClipping(0.25), [(4, 3)])(tf.constant(gradient))
    np.testing.assert_allclose(result, gradient * 0.25 / rms, rtol=1e-6)


CLIPS = {
    "global norm": (lambda: hooks.GlobalNormClipping(1.5), 1.5, _norm),
    "norm": (lambda: hooks.NormClipping(1.5), 1.5, _norm),
    "layer norm": (lambda: hooks.NormClipping(1.5, per_layer=True), 1.5, _norm),
    "block RMS": (
        lambda: hooks.BlockRMSClipping(0.5),
        0.5,
        lambda g: np.sqrt(np.mean(np.asarray(g, "float64") ** 2)),
    ),
}


@pytest.mark.parametrize("kind", CLIPS)
def test_sparse_gradients_are_clipped_as_dense_ones(bench, kind):
    make, bound, measure = CLIPS[kind]
    values = tf.constant([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    slices = tf.IndexedSlices(values, tf.constant([0, 2, 0]), tf.constant([3, 2]))
    dense = np.array([[6.0, 8.0], [0.0, 0.0], [3.0, 4.0]])
    (result,) = bench(make(), [(3, 2)])(slices)
    np.testing.assert_allclose(result, dense * bound / measure(dense), rtol=1e-6)


def test_value_of_repeated_rows_is_that_of_their_sum(bench):
    values = tf.constant([[1.0], [3.0], [-2.5]])
    slices = tf.IndexedSlices(values, tf.constant([1, 1, 0]), tf.constant([3, 1]))
    (result,) = bench(hooks.ValueClipping(2.0), [(3, 1)])(slices)
    np.testing.assert_array_equal(result, [[-2.0], [2.0], [0.0]])


@pytest.mark.parametrize("kind", [*CLIPS, "value", "adaptive"])
def test_half_precision_and_none(bench, kind):
    other = {"value": lambda: hooks.ValueClipping(0.5), "adaptive": hooks.AdaptiveClipping}
    make = other[kind] if kind in other else CLIPS[kind][0]
    half = keras.Variable(np.ones(500), dtype="float16", name="half")
    missing = keras.Variable([1.0], name="missing")
    values = tf.cast(tf.fill([500], 2000.0), tf.float16)
    result, none = bench(make(), [half, missing])(values, None)
    assert none is None and result.dtype == np.float16
    # The sum of squares is 2e9, far beyond float16.
    assert np.isfinite(result).all() and (result > 0).all() and _norm(result) < 12


def test_schedules_and_functions_are_values_at_the_step(bench):
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([0], [4.0, 1.0])
    for number in (schedule, lambda step: tf.where(step > 0, 1.0, 4.0)):
        run = bench(hooks.NormClipping(number), [(1,)])
        assert [float(run([10.0])[0][0]) for _ in range(3)] == [4.0, 1.0, 1.0]


def test_targets_bound_the_norm(bench):
    run = bench(hooks.GlobalNormClipping(1.0, targets="v0"), [(1,), (1,)])
    first, second = run([2.0], [1000.0])
    assert first == [1.0] and second == [1000.0]


# AdaptiveClipping


def _reference(gradient, weights, axes, ratio):
    """Equation 3 in float64, one unit after the other."""
    gradient, weights = (np.asarray(a, "float64") for a in (gradient, weights))
    kept = [i for i in range(gradient.ndim) if i not in axes]
    result = gradient.copy()
    for unit in np.ndindex(*[gradient.shape[i] for i in kept]):
        index = [slice(None)] * gradient.ndim
        for axis, place in zip(kept, unit, strict=True):
            index[axis] = place
        bound = ratio * max(_norm(weights[tuple(index)]), 1e-3)
        norm = _norm(gradient[tuple(index)])
        if norm > bound:
            result[tuple(index)] *= bound / norm
    return result


def test_adaptive_worked_number(bench):
    layer = layers.Dense(2, use_bias=False)
    layer.build((None, 2))
    layer.kernel.assign([[3.0, 0.0], [4.0, 1e-5]])
    (result,) = bench(hooks.AdaptiveClipping(0.01), layer)([[6.0, 1.0], [8.0, 0.0]])
    np.testing.assert_allclose(result, [[0.03, 1e-5], [0.04, 0.0]], rtol=1e-6)


LAYERS = {
    "Dense": (lambda: layers.Dense(3), (4,)),
    "Conv1D": (lambda: layers.Conv1D(3, 2), (6, 4)),
    "Conv2D grouped": (lambda: layers.Conv2D(4, 2, groups=2), (6, 6, 4)),
    "Conv3D": (lambda: layers.Conv3D(3, 2), (4, 4, 4, 2)),
    "Conv2DTranspose": (lambda: layers.Conv2DTranspose(3, 2), (5, 5, 4)),
    "DepthwiseConv2D": (lambda: layers.DepthwiseConv2D(2, depth_multiplier=3), (5, 5, 4)),
    "SeparableConv2D": (lambda: layers.SeparableConv2D(3, 2), (5, 5, 4)),
    "MultiHeadAttention": (lambda: layers.MultiHeadAttention(2, 3), None),
    "LSTM": (lambda: layers.LSTM(3), (5, 4)),
    "GRU": (lambda: layers.GRU(3), (5, 4)),
    "Embedding": (lambda: layers.Embedding(5, 3), ()),
    "EinsumDense": (lambda: layers.EinsumDense("abc,cd->abd", (None, 3)), (2, 4)),
    "BatchNormalization": (lambda: layers.BatchNormalization(), (4,)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_adaptive_of_every_layer(bench, name):
    make, shape = LAYERS[name]
    layer = make()
    if shape is None:
        layer(np.zeros((1, 3, 4)), np.zeros((1, 3, 4)))
    else:
        layer.build((None, *shape))
    units = unit_axes(layer)
    variables = layer.trainable_variables
    for variable in variables:
        variable.assign(RNG.normal(size=variable.shape))
    gradients = [(0.1 * RNG.normal(size=v.shape)).astype("float32") for v in variables]
    results = bench(hooks.AdaptiveClipping(0.05), layer)(*map(tf.constant, gradients))
    clipped = False
    for variable, gradient, result in zip(variables, gradients, results, strict=True):
        axes = units[id(variable)].axes
        expected = _reference(gradient, variable.numpy(), axes, 0.05)
        clipped |= not np.array_equal(expected, gradient)
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-8)
    assert clipped


def test_adaptive_of_sparse_rows(bench):
    layer = layers.Embedding(4, 2)
    layer.build(())
    layer.embeddings.assign([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    values = tf.constant([[3.0, 4.0], [0.001, 0.0], [3.0, 4.0]])
    slices = tf.IndexedSlices(values, tf.constant([0, 1, 0]), tf.constant([4, 2]))
    run = bench(hooks.AdaptiveClipping(0.1), layer)
    (result,) = run(slices)
    np.testing.assert_allclose(result, [[0.3, 0.4], [0.001, 0], [0, 0], [0, 0]], rtol=1e-6)


def test_adaptive_lets_zero_weights_move_and_huge_gradients_pass_clipped(bench):
    layer = layers.Dense(1, use_bias=False)
    layer.build((None, 2))
    layer.kernel.assign([[0.0], [0.0]])
    (result,) = bench(hooks.AdaptiveClipping(0.5), layer)([[3e20], [4e20]])
    np.testing.assert_allclose(result, [[0.5e-3 * 0.6], [0.5e-3 * 0.8]], rtol=1e-6)


WRONG = [
    (hooks.GlobalNormClipping, "max_norm"),
    (hooks.NormClipping, "max_norm"),
    (hooks.ValueClipping, "max_value"),
    (hooks.BlockRMSClipping, "max_rms"),
    (hooks.AdaptiveClipping, "max_ratio"),
]


@pytest.mark.parametrize(("cls", "argument"), WRONG, ids=lambda v: getattr(v, "__name__", v))
def test_wrong_bounds(cls, argument):
    for value in (0, -1.0):
        text = f"`{argument}` must be a positive number. Received: {argument}={value}"
        with pytest.raises(ValueError, match=text):
            cls(value)
    for value in ("1", None, True, [1.0]):
        with pytest.raises(TypeError, match=f"`{argument}` must be a number, a .* Received:"):
            cls(value)
    with pytest.raises(ValueError, match=f"`{argument}` must not be NaN"):
        cls(float("nan"))


def test_per_layer_must_be_a_bool():
    with pytest.raises(TypeError, match="`per_layer` must be a bool. Received: per_layer='yes'"):
        hooks.NormClipping(1.0, per_layer="yes")
