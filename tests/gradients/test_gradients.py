"""`Gradients`: None, sparse rows, half precision, overflow and underflow."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_tapefit import Gradients
from keras_tapefit.gradients import sparse


def _variable(shape, name="w", dtype="float32"):
    *scopes, name = name.split("/")
    with contextlib.ExitStack() as stack:
        for scope in scopes:
            stack.enter_context(keras.name_scope(scope))
        return keras.Variable(np.zeros(shape), dtype=dtype, name=name)


def _slices(values, indices, shape):
    return tf.IndexedSlices(
        tf.constant(values, tf.float32), tf.constant(indices), tf.constant(shape)
    )


@pytest.fixture
def mixed():
    """A dense gradient, one that is missing, and a sparse one that repeats a row."""
    dense, missing, table = _variable((2,), "a/w"), _variable((3,), "b/w"), _variable((3, 2), "t")
    repeated = _slices([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], [0, 2, 0], [3, 2])
    pairs = [(tf.constant([1.0, -2.0]), dense), (None, missing), (repeated, table)]
    return Gradients(pairs)


TRUE_TABLE = np.array([[6.0, 8.0], [0.0, 0.0], [3.0, 4.0]])


def test_norms_sum_repeated_rows_and_leave_none_out(mixed):
    whole = np.concatenate([[1.0, -2.0], TRUE_TABLE.ravel()])
    np.testing.assert_allclose(mixed.global_norm(), np.linalg.norm(whole), rtol=1e-6)
    norms = mixed.norms()
    assert list(norms) == ["a/w", "t"]
    np.testing.assert_allclose(norms["t"], np.linalg.norm(TRUE_TABLE), rtol=1e-6)


def test_map_sees_sums_of_repeated_rows(mixed):
    def clip(gradient):
        return tf.clip_by_value(gradient, -5.0, 5.0)

    for keeps_zero in (True, False, [False, False, True]):
        result = mixed.map(clip, keeps_zero=keeps_zero)
        is_sparse = isinstance(result["t"], tf.IndexedSlices)
        assert is_sparse == (keeps_zero is not False)
        table = sparse.to_dense(result["t"])
        np.testing.assert_array_equal(table, np.clip(TRUE_TABLE, -5, 5))
        assert result["b/w"] is None


def test_map_by_row_gathers_rows_of_variables(mixed):
    table = mixed.variables[2]
    table.assign([[1.0, 1.0], [7.0, 7.0], [2.0, 2.0]])
    result = mixed.map(lambda g, v: g * v, mixed.variables, keeps_zero=True)
    assert isinstance(result["t"], tf.IndexedSlices)
    expected = TRUE_TABLE * [[1.0], [7.0], [2.0]]
    np.testing.assert_array_equal(sparse.to_dense(result["t"]), expected)


def test_map_takes_other_gradients(mixed):
    doubled = mixed.map(lambda g, other: g + other, mixed.scale(1.0))
    np.testing.assert_array_equal(doubled["a/w"], [2.0, -4.0])
    np.testing.assert_array_equal(doubled["t"], 2 * TRUE_TABLE)


def test_present_gradients_are_replaced_in_order(mixed):
    dense, table = mixed.present()
    assert dense is mixed["a/w"] and table is mixed["t"]
    result = mixed.with_present([dense * 2.0, sparse.with_values(table, table.values * 3.0)])
    np.testing.assert_array_equal(result["a/w"], [2.0, -4.0])
    assert result["b/w"] is None and result.variables == mixed.variables
    np.testing.assert_array_equal(sparse.to_dense(result["t"]), 3 * TRUE_TABLE)
    # Rows may repeat in what is given, so they are summed before a norm is taken.
    unique = mixed.with_unique_rows().with_present(mixed.present())
    np.testing.assert_allclose(unique.global_norm(), mixed.global_norm())


@pytest.mark.parametrize("count", [1, 3])
def test_with_present_counts_what_it_is_given(mixed, count):
    with pytest.raises(ValueError, match=f"must hold 2 gradients.* Received: {count}"):
        mixed.with_present([tf.zeros(2)] * count)


def test_scale_keeps_sparse_and_none(mixed):
    result = mixed.scale(0.5)
    assert isinstance(result["t"], tf.IndexedSlices) and result["b/w"] is None
    np.testing.assert_array_equal(sparse.to_dense(result["t"]), TRUE_TABLE / 2)


def test_scale_of_half_precision_happens_in_float32():
    variable = _variable((2,), dtype="float16")
    gradients = Gradients([(tf.constant([4096.0, 8192.0], tf.float16), variable)])
    scaled = gradients.scale(1e-8).scale(1e8)
    assert scaled["w"].dtype == tf.float16
    # 1e-8 itself is 0 in float16, the product 4096e-8 is not.
    assert float(gradients.scale(1e-8)["w"][0]) > 0


@pytest.mark.parametrize("huge", [1e20, 3e38])
def test_norm_does_not_overflow(huge):
    gradients = Gradients([(tf.constant([huge, 0.0]), _variable((2,)))])
    np.testing.assert_allclose(gradients.global_norm(), huge, rtol=1e-6)
    np.testing.assert_allclose(gradients.norms()["w"], huge, rtol=1e-6)


def test_norm_of_huge_elements_in_several_tensors():
    a, b = _variable((2,), "a"), _variable((1,), "b")
    gradients = Gradients([(tf.constant([3e20, 0.0]), a), (tf.constant([4e20]), b)])
    np.testing.assert_allclose(gradients.global_norm(), 5e20, rtol=1e-6)


@pytest.mark.parametrize("tiny", [1e-20, 1e-30])
def test_norm_does_not_underflow(tiny):
    gradients = Gradients([(tf.constant([3 * tiny, 4 * tiny]), _variable((2,)))])
    np.testing.assert_allclose(gradients.global_norm(), 5 * tiny, rtol=1e-6)


def test_norm_of_zeros_and_of_nothing_is_zero():
    assert float(Gradients([(tf.zeros(2), _variable((2,)))]).global_norm()) == 0
    assert float(Gradients([(None, _variable((2,)))]).global_norm()) == 0
    assert float(Gradients([]).global_norm()) == 0
    assert float(Gradients([(tf.zeros((0, 2)), _variable((0, 2)))]).global_norm()) == 0


def test_norm_of_non_finite_gradients_says_so():
    variable = _variable((2,))
    infinite = Gradients([(tf.constant([np.inf, 1.0]), variable)])
    broken = Gradients([(tf.constant([np.nan, np.inf]), variable)])
    assert np.isinf(infinite.global_norm()) and np.isnan(broken.global_norm())


def test_norm_of_half_precision_is_float32():
    values = np.full(1000, 200.0, "float16")
    gradients = Gradients([(tf.constant(values), _variable((1000,), dtype="float16"))])
    assert gradients.global_norm().dtype == tf.float32
    expected = np.linalg.norm(values.astype("float64"))
    np.testing.assert_allclose(gradients.global_norm(), expected, rtol=1e-6)


def test_norm_is_as_exact_as_numpy_in_float64():
    values = np.random.default_rng(0).normal(size=(100, 100))
    gradients = Gradients([(tf.constant(values), _variable((100, 100), dtype="float64"))])
    np.testing.assert_allclose(gradients.global_norm(), np.linalg.norm(values), rtol=1e-14)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_all_finite(mixed, bad):
    assert bool(mixed.all_finite())
    assert bool(Gradients([(None, _variable((1,)))]).all_finite())
    sliced = _slices([[1.0], [bad]], [1, 1], [2, 1])
    assert not bool(Gradients([(sliced, _variable((2, 1)))]).all_finite())


def test_norm_in_graph_and_eagerly_are_kept_apart(mixed):
    eager = float(mixed.global_norm())
    assert float(tf.function(lambda: mixed.global_norm())()) == pytest.approx(eager, rel=1e-6)
    assert float(mixed.global_norm()) == eager


def test_lookup_by_variable_path_and_end_of_path(mixed):
    variable = mixed.variables[0]
    np.testing.assert_array_equal(mixed[variable], [1.0, -2.0])
    np.testing.assert_array_equal(mixed["a/w"], [1.0, -2.0])
    assert variable in mixed and variable.value in mixed and "nothing" not in mixed
    nested = Gradients([(tf.constant([3.0]), _variable((1,), "model/dense/kernel"))])
    assert float(nested["dense/kernel"][0]) == 3 and float(nested["kernel"][0]) == 3
    with pytest.raises(KeyError, match="No gradient for 'w'. The variables are: 'a/w', 'b/w'"):
        mixed["w"]  # two paths end so


def test_mapping_interface(mixed):
    assert list(mixed) == mixed.keys() == ["a/w", "b/w", "t"]
    assert [path.variable for path in mixed] == mixed.variables
    assert len(mixed) == 3 and len(mixed.items()) == 3
    assert "a/w: shape=(2,), dtype=float32" in repr(mixed)
    assert "b/w: None" in repr(mixed) and "t: sparse, shape=(3, 2)" in repr(mixed)


def test_select_and_updated(mixed):
    chosen = mixed.select("a/*")
    assert chosen.keys() == ["a/w"]
    merged = mixed.updated(chosen.scale(2.0))
    np.testing.assert_array_equal(merged["a/w"], [2.0, -4.0])
    assert merged["t"] is mixed["t"]
    with pytest.raises(ValueError, match="matches no variable"):
        mixed.select("c/*")


def test_plus(mixed):
    total = mixed.plus(mixed)
    np.testing.assert_array_equal(total["a/w"], [2.0, -4.0])
    assert total["b/w"] is None and isinstance(total["t"], tf.IndexedSlices)
    np.testing.assert_array_equal(sparse.to_dense(total["t"]), 2 * TRUE_TABLE)
    expected = np.linalg.norm(np.concatenate([[2.0, -4.0], 2 * TRUE_TABLE.ravel()]))
    np.testing.assert_allclose(total.global_norm(), expected, rtol=1e-6)


def test_sum_of_repeated_rows_compiles_with_xla():
    values = np.random.default_rng(1).normal(size=(50, 3)).astype("float32")
    indices = np.random.default_rng(2).integers(0, 7, size=50)

    @tf.function(jit_compile=True)
    def summed(values, indices):
        slices = tf.IndexedSlices(values, indices, tf.constant([7, 3], tf.int64))
        return sparse.sum_duplicates(slices, 7).values

    rows = summed(values, indices)
    dense = np.zeros((7, 3))
    np.add.at(dense, indices, values)
    kept = np.zeros((7, 3))
    np.add.at(kept, indices, rows)
    np.testing.assert_allclose(kept, dense, rtol=1e-5, atol=1e-6)
    # One slice of each index holds the sum, the others are zero.
    np.testing.assert_allclose(np.square(rows).sum(), np.square(dense).sum(), rtol=1e-5)


def test_pairs_are_checked():
    variable = _variable((2,), "w")
    with pytest.raises(TypeError, match=r"pairs `\(gradient, variable\)`. Received: 3 \(of type"):
        Gradients([3])
    with pytest.raises(TypeError, match=r"pairs `\(gradient, variable\)`. Received: \("):
        Gradients([(variable, tf.zeros(2))])
    text = r"gradient of 'w' must have the variable's shape \(2,\). Received: .* shape \(3,\)"
    with pytest.raises(ValueError, match=text):
        Gradients([(tf.zeros(3), variable)])
    np.testing.assert_array_equal(Gradients([([1.0, 2.0], variable)])["w"], [1.0, 2.0])
