"""The order of the passes through a model, watched from inside of it."""

import functools
import time
from typing import Any

import tensorflow as tf


def watched(order: list[tuple[str, int]]) -> Any:
    """Returns a function that gives back a tensor, to be put into a model.

    A backward pass takes a while: what need not wait for its end does not.

    Args:
        order: gets `("forward", number)` or `("backward", number)` for each pass, with the
            first number in the tensor or its gradient.
    """

    def noted(name: str, seconds: float, value: tf.Tensor) -> tf.Tensor:
        def note(value: Any) -> Any:
            time.sleep(seconds)
            order.append((name, int(value.ravel()[0])))
            return value

        return tf.ensure_shape(tf.numpy_function(note, [value], value.dtype), value.shape)

    @tf.custom_gradient
    def unchanged(value: tf.Tensor) -> Any:
        return noted("forward", 0.0, value), functools.partial(noted, "backward", 0.05)

    return unchanged
