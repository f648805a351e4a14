"""Small gradients as one: the same numbers, in their places."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_tapefit import Gradients, TapeModel, hooks
from keras_tapefit.gradients import xla
from keras_tapefit.gradients.joined import Joined

SHAPES = [(3, 4), (), (0, 4), (5000, 2), (7,), (1,), (2, 1, 2), (2, 4)]


def make(rng):
    """Gradients of several shapes, large ones, half precision and a sparse one."""
    dense = [tf.constant(rng.standard_normal(shape), tf.float32) for shape in SHAPES]
    half = [tf.constant(rng.standard_normal(shape), tf.float16) for shape in [(3, 4), (1, 4)]]
    sparse = tf.IndexedSlices(tf.ones((2, 3)), tf.constant([3, 0]), tf.constant([4, 3]))
    return [*dense[:2], half[0], sparse, *dense[2:], half[1]]


@pytest.mark.parametrize("traced", [False, True])
def test_all_come_back_as_they_were(traced):
    given = make(np.random.default_rng(0))

    def there_and_back():
        joined = Joined.of(given)
        # Three of rows of four, two vectors, two of half precision; the others are alone.
        assert len(joined.pieces) == 7
        return joined.divided()

    back = tf.function(there_and_back)() if traced else there_and_back()
    for before, after in zip(given, back, strict=True):
        if isinstance(before, tf.IndexedSlices):
            before, after = before.values, after.values
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(after.numpy(), before.numpy())


def test_what_has_no_fixed_size_stays_apart():
    @tf.function(input_signature=[tf.TensorSpec([None, 3]), tf.TensorSpec([3])])
    def pieces(a, b):
        return [tf.shape(piece) for piece in Joined.of([a, b, 2.0 * b]).pieces]

    assert [list(shape) for shape in pieces(tf.ones((2, 3)), tf.ones(3))] == [[2, 3], [6]]


def test_xla_gets_them_one_by_one():
    with xla.in_xla():
        assert len(Joined.of([tf.ones(3), tf.ones(2)]).pieces) == 2


def test_clipping_is_that_of_float64_for_large_and_small_ones():
    rng = np.random.default_rng(1)
    shapes = [shape for shape in SHAPES if 0 not in shape]
    values = [rng.standard_normal(shape).astype("float32") for shape in shapes]
    variables = [keras.Variable(np.zeros(shape, "float32")) for shape in shapes]
    gradients = Gradients([(tf.constant(g), v) for g, v in zip(values, variables, strict=True)])
    hook = hooks.GlobalNormClipping(2.0)
    clipped = hook.apply(gradients)
    norm = np.sqrt(sum(np.sum(g.astype("float64") ** 2) for g in values))
    np.testing.assert_allclose(float(gradients.global_norm()), norm, rtol=1e-6)
    for after, before in zip(clipped.values(), values, strict=True):
        np.testing.assert_allclose(after, before * 2.0 / norm, rtol=1e-6)
    np.testing.assert_allclose(float(clipped.global_norm()), 2.0, rtol=1e-6)


def test_under_xla_clipping_has_no_branch_with_gradients():
    """With one in the program, XLA took six minutes to compile a Transformer."""
    inputs = keras.Input((4,))
    model = TapeModel(inputs, keras.layers.Dense(300)(keras.layers.Dense(300)(inputs)))
    model.compile("sgd", "mse", gradient_hooks=[hooks.GlobalNormClipping(0.1)], jit_compile=True)
    x = np.ones((8, 4), "float32")
    seen = []
    clip = hooks.GlobalNormClipping.clip

    def noted(self, gradients):
        clipped = clip(self, gradients)
        graph = tf.compat.v1.get_default_graph()
        seen.append({op.type for op in graph.get_operations()})
        return clipped

    hooks.GlobalNormClipping.clip = noted
    try:
        model.fit(x, np.ones((8, 300), "float32"), verbose=0)
    finally:
        hooks.GlobalNormClipping.clip = clip
    assert seen
    assert not {"Case", "StatelessCase"} & seen[0]
