"""Arithmetic on `tf.IndexedSlices`, the gradient of a lookup."""

from typing import TypeAlias

import tensorflow as tf

Gradient: TypeAlias = tf.Tensor | tf.IndexedSlices


def sum_duplicates(gradient: Gradient, num_rows: int) -> Gradient:
    """Sums the rows of a sparse gradient that share an index.

    The first slice of each index gets the sum and the others zero, so shapes stay
    static: the result compiles with XLA and needs no sort. Anything read from the
    values afterwards (a norm, a square, a maximum) is what the dense gradient gives.

    Args:
        gradient: a tensor, returned as it is, or `tf.IndexedSlices`.
        num_rows: rows of the variable, the bound of the indices.

    Returns:
        A gradient of the same type and shapes.
    """
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient
    indices = tf.cast(gradient.indices, tf.int32)
    num_slices = tf.shape(indices)[0]
    positions = tf.range(num_slices)
    first = tf.gather(tf.math.unsorted_segment_min(positions, indices, num_rows), indices)
    values = tf.math.unsorted_segment_sum(gradient.values, first, num_slices)
    return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)


def to_dense(gradient: Gradient) -> tf.Tensor:
    """Returns the gradient as a tensor of the variable's shape."""
    if not isinstance(gradient, tf.IndexedSlices):
        return gradient
    if 0 in gradient.values.shape[1:]:
        # `scatter_nd` refuses a result without elements.
        return tf.zeros(gradient.dense_shape, gradient.values.dtype)
    # Through a scatter: `tf.convert_to_tensor` warns that this may take memory.
    shape = tf.cast(gradient.dense_shape, gradient.indices.dtype)
    return tf.scatter_nd(gradient.indices[:, tf.newaxis], gradient.values, shape)


def values_of(gradient: Gradient) -> tf.Tensor:
    """Returns the numbers a gradient stores: the slices of a sparse one."""
    return gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient


def with_values(gradient: Gradient, values: tf.Tensor) -> Gradient:
    """Returns a gradient like `gradient` that stores `values`."""
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
    return values


def add(a: Gradient | None, b: Gradient | None) -> Gradient | None:
    """Returns the sum of two gradients; two sparse ones give a sparse one."""
    if a is None or b is None:
        return b if a is None else a
    if isinstance(a, tf.IndexedSlices) and isinstance(b, tf.IndexedSlices):
        values = tf.concat([a.values, b.values], axis=0)
        indices = tf.concat([a.indices, tf.cast(b.indices, a.indices.dtype)], axis=0)
        return tf.IndexedSlices(values, indices, a.dense_shape)
    return to_dense(a) + to_dense(b)
