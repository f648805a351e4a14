"""Norms that neither overflow nor underflow, in float32 or wider."""

from collections.abc import Sequence

import tensorflow as tf


def wide(value: tf.Tensor) -> tf.Tensor:
    """Casts float16 and bfloat16 to float32, so sums of squares stay exact."""
    return tf.cast(value, tf.float32) if value.dtype.size < 4 else value


def joint_norm(values: Sequence[tf.Tensor]) -> tf.Tensor:
    """Returns `sqrt(Σ x²)` over all elements of all tensors.

    The plain sum of squares is taken first. Where it left the range in which float32
    can hold it, and only there, the sum is taken again over values divided by
    their largest magnitude. Infinite elements give inf, NaN gives NaN.

    Args:
        values: floating-point tensors of any shapes. Empty: the norm is 0.

    Returns:
        A scalar: float32, or float64 when any of the values is.
    """
    values = [wide(value) for value in values]
    dtype = tf.float64 if any(v.dtype == tf.float64 for v in values) else tf.float32
    if not values:
        return tf.zeros((), dtype)
    squares = tf.add_n([tf.cast(2.0 * tf.nn.l2_loss(v), dtype) for v in values])

    def scaled() -> tf.Tensor:
        largest = tf.reduce_max(
            tf.stack([tf.cast(tf.reduce_max(tf.abs(v)), dtype) for v in values if _filled(v)])
        )
        divisor = tf.where(tf.math.is_finite(largest) & (largest > 0), largest, 1.0)
        total = tf.add_n(
            [
                tf.reduce_sum(tf.square(tf.cast(v, dtype) / divisor))
                for v in values
            ]
        )
        return divisor * tf.sqrt(total)

    safe = (squares > 1e-30) & (squares < 1e38)
    return tf.cond(safe, lambda: tf.sqrt(squares), scaled)


def _filled(value: tf.Tensor) -> bool:
    return value.shape.num_elements() != 0


def axes_norm(value: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    """Returns norms over `axes`, kept as dimensions of size 1, safe against overflow.

    Args:
        value: a floating-point tensor.
        axes: the axes to reduce over.

    Returns:
        A tensor of the rank of `value`, float32 or wider.
    """
    value = wide(value)
    largest = tf.reduce_max(tf.abs(value), axes, keepdims=True)
    divisor = tf.where(tf.math.is_finite(largest) & (largest > 0), largest, 1.0)
    total = tf.reduce_sum(tf.square(value / divisor), axes, keepdims=True)
    return divisor * tf.sqrt(total)
