"""Gaussian noise that is the same in every mode."""

import math
from collections.abc import Sequence

import tensorflow as tf


def stateless_normal(shape: Sequence[int], seed: tf.Tensor) -> tf.Tensor:
    """Draws from N(0, 1), a function of the seed alone.

    `tf.random.stateless_normal` draws other numbers when compiled by XLA, with one
    algorithm named too: only the random bits are the same. So the transform from bits to
    numbers (Box and Muller) is made here.

    Args:
        shape: of the result, static.
        seed: two integers.

    Returns:
        A float32 tensor.
    """
    bits = tf.random.stateless_uniform(
        [2, *shape], seed, minval=None, maxval=None, dtype=tf.uint32, alg="philox"
    )
    # The upper 24 bits, which float32 holds exactly; never zero, for the logarithm.
    upper = tf.bitwise.right_shift(bits, tf.constant(8, tf.uint32))
    steps = tf.cast(tf.cast(upper, tf.int32), tf.float32)
    first, second = tf.unstack((steps + 0.5) / 2.0**24)
    return tf.sqrt(-2.0 * tf.math.log(first)) * tf.cos(2.0 * math.pi * second)
