"""Random numbers that depend on two integers alone, the same in every mode.

`tf.random.stateless_normal` and `stateless_uniform` draw other floats when compiled by
XLA, with one algorithm named too: only Philox's random bits are the same (TensorFlow
2.21). So the way from bits to numbers is made here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf


def uniform(shape: Sequence[int], seed: tuple[Any, Any]) -> tf.Tensor:
    """Returns numbers in (0, 1).

    Args:
        shape: of the result, static.
        seed: two integers, or scalar integer tensors.

    Returns:
        A float32 tensor.
    """
    words = tf.stack([tf.cast(word, tf.int64) for word in seed])
    bits = tf.random.stateless_uniform(
        shape, words, minval=None, maxval=None, dtype=tf.uint32, alg="philox"
    )
    # The upper 23 bits, so that float32 holds the middle of each step exactly.
    upper = tf.bitwise.right_shift(bits, tf.constant(9, tf.uint32))
    return (tf.cast(tf.cast(upper, tf.int32), tf.float32) + 0.5) / 2.0**23


def normal(shape: Sequence[int], seed: tuple[Any, Any]) -> tf.Tensor:
    """Returns standard normal numbers, by the transform of Box and Muller.

    Args:
        shape: of the result, static.
        seed: two integers, or scalar integer tensors.

    Returns:
        A float32 tensor.
    """
    size = math.prod(shape)
    first, second = tf.unstack(uniform([2, (size + 1) // 2], seed))
    length, angle = tf.sqrt(-2.0 * tf.math.log(first)), 2.0 * math.pi * second
    # Two independent numbers of each pair.
    both = tf.concat([length * tf.cos(angle), length * tf.sin(angle)], axis=0)
    return tf.reshape(both[:size], shape)
