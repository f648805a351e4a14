"""Random numbers that depend on two integers alone, the same in every mode.

TensorFlow's own stateless numbers are others under XLA than without it, `alg="philox"`
included: from equal keys and counters XLA on a CPU draws other bits (TensorFlow 2.21).
Here they are made of integer arithmetic.

Reference: Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3"
(Threefry-2x32, 20 rounds).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

_ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
_NUM_ROUNDS = 20


def bits(num_pairs: int, key: tuple[Any, Any]) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns random bits.

    Args:
        num_pairs: how many pairs.
        key: two integers, or scalar tensors of them.

    Returns:
        Two uint32 tensors of shape `[num_pairs]`.
    """
    first, second = (_uint32(word) for word in key)
    keys = (first, second, first ^ second ^ np.uint32(0x1BD11BDA))
    x = tf.cast(tf.range(num_pairs), tf.uint32) + keys[0]
    y = tf.zeros([num_pairs], tf.uint32) + keys[1]
    for i in range(_NUM_ROUNDS):
        turn = _ROTATIONS[i % 8]
        x += y
        y = x ^ (
            tf.bitwise.left_shift(y, _fill(y, turn))
            | tf.bitwise.right_shift(y, _fill(y, 32 - turn))
        )
        if i % 4 == 3:
            block = i // 4 + 1
            x += keys[block % 3]
            y += keys[(block + 1) % 3] + np.uint32(block)
    return x, y


def uniform(shape: Sequence[int], key: tuple[Any, Any]) -> tf.Tensor:
    """Returns numbers in [0, 1), float32."""
    x, _ = bits(math.prod(shape), key)
    return tf.reshape(_fraction(x), shape)


def normal(shape: Sequence[int], key: tuple[Any, Any]) -> tf.Tensor:
    """Returns standard normal numbers, float32; by Box and Muller, two from each pair."""
    size = math.prod(shape)
    x, y = bits(-(-size // 2), key)
    radius = tf.sqrt(-2.0 * tf.math.log(_fraction(x) + 2.0**-24))
    angle = 2.0 * math.pi * _fraction(y)
    both = tf.concat([radius * tf.cos(angle), radius * tf.sin(angle)], axis=0)
    return tf.reshape(both[:size], shape)


def _fraction(value: tf.Tensor) -> tf.Tensor:
    high = tf.bitwise.right_shift(value, _fill(value, 8))
    return tf.cast(tf.cast(high, tf.int32), tf.float32) * 2.0**-24


def _fill(like: tf.Tensor, value: int) -> tf.Tensor:
    return tf.fill(tf.shape(like), np.uint32(value))


def _uint32(word: Any) -> Any:
    if isinstance(word, int | np.integer):
        return tf.constant(int(word) % 2**32, tf.uint32)
    return tf.cast(tf.cast(word, tf.int64) % 2**32, tf.uint32)
