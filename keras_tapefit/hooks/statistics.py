"""Running mean and variance of a scalar, as state of a hook."""

from __future__ import annotations

import tensorflow as tf

from keras_tapefit.gradients import Gradients
from keras_tapefit.hooks.base import GradientHook


def finite_norm(gradients: Gradients) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the global norm, scalar float32, and whether all elements are finite.

    Of finite elements it is at most the largest float.
    """
    norm, (_, finite) = gradients.global_norm(), gradients._length_and_finite()
    norm = tf.cast(norm, tf.float32)
    return tf.where(finite, tf.minimum(norm, tf.float32.max), norm), finite


class Moments:
    """Mean and variance: plain over a warm-up, exponential moving averages afterwards.

    Args:
        hook: whose state they are; to be made in its `build`.
        num_warmup_steps: the number of values in the warm-up.
    """

    def __init__(self, hook: GradientHook, num_warmup_steps: int) -> None:
        self._num_warmup_steps = num_warmup_steps
        self._count = hook.add_variable(dtype="int64", name="count")
        self._mean = hook.add_variable(name="mean")
        self._variance = hook.add_variable(name="variance")

    @property
    def mean(self) -> tf.Tensor:
        return tf.convert_to_tensor(self._mean.value)

    @property
    def stddev(self) -> tf.Tensor:
        return tf.sqrt(self._variance.value)

    @property
    def ready(self) -> tf.Tensor:
        """Scalar bool: the warm-up is over."""
        return self._count.value >= self._num_warmup_steps

    def zscore(self, value: tf.Tensor) -> tf.Tensor:
        """Returns how many standard deviations a value lies above the mean."""
        return (value - self.mean) / (self.stddev + 1e-6)

    def add(self, value: tf.Tensor, momentum: tf.Tensor, when: tf.Tensor) -> None:
        """Takes a value into the statistics.

        Args:
            value: scalar float32.
            momentum: of the moving averages; the warm-up does not use it.
            when: scalar bool; where false nothing changes.
        """
        mean, variance = self.mean, tf.convert_to_tensor(self._variance.value)
        new_count = self._count.value + 1
        # Welford's update gives mean and population variance of the warm-up.
        rate = tf.where(self.ready, 1.0 - momentum, 1.0 / tf.cast(new_count, tf.float32))
        new_mean = mean + rate * (value - mean)
        spread = tf.where(
            self.ready, tf.square(value - new_mean), (value - mean) * (value - new_mean)
        )
        # The square of a huge norm may be too large for float32.
        new_variance = variance + rate * (tf.minimum(spread, spread.dtype.max) - variance)
        self._mean.assign(tf.where(when, new_mean, mean))
        self._variance.assign(tf.where(when, new_variance, variance))
        self._count.assign(tf.where(when, new_count, self._count.value))
