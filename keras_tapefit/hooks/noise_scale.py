"""The gradient noise scale: how large a batch is worth its price."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from keras_tapefit.gradients import Gradients
from keras_tapefit.hooks.base import GradientHook
from keras_tapefit.hooks.number import Number
from keras_tapefit.hooks.step import LogEntry, Parts


@keras.saving.register_keras_serializable("keras_tapefit")
class NoiseScale(GradientHook):
    """Logs the gradient noise scale, in examples.

    Much smaller batches than that waste steps, much larger ones waste examples. It
    compares the gradient of the batch with those of its parts, so there must be some:
    `compile(micro_batches=k)`, or replicas. Where it stands among the hooks is all the
    same: it looks at the gradients as they were before all of them. The log entry is
    `noise_scale`.

    Formula: with the mean square norm `|G_b|²` of parts of `b` examples each and the
    square norm `|G_B|²` of the batch of `B`: `|G|² = (B|G_B|² − b|G_b|²) / (B − b)`,
    `S = (|G_b|² − |G_B|²) / (1/b − 1/B)`, and the log entry is `EMA(S) / EMA(|G|²)`.
    Parts may differ in size: `1/b` and `1/B` are then what the variance of a mean of
    that make is divided by, and both estimates stay unbiased. What counts as an example
    is what the loss divides by: of outputs with a mask, an element that is not masked.

    A step counts for nothing where `EMA(|G|²)` is not positive, as may be early on or
    near a minimum; an entry of 0 means that no step of the epoch counted.

    Reference: McCandlish et al. 2018, arXiv:1812.06162, appendix A.1.

    Args:
        momentum: of the two moving averages, from 0 to 1; a number, a schedule or a
            callable of the step.
        name: the hook's name. The log entry is `noise_scale`, or `<name>_noise_scale`
            when a name is given.

    Raises:
        TypeError, ValueError: when `momentum` is out of range.
        ValueError: at the first step, when the batch has no parts.

    Example:

    ```python
    model.compile("adam", "mse", gradient_hooks=[hooks.NoiseScale()], micro_batches=4)
    ```
    """

    uses_parts = True
    momentum = Number(minimum=0, maximum=1, neutral=1)

    def __init__(self, momentum: Any = 0.99, name: str | None = None) -> None:
        super().__init__(name=name)
        self.momentum = momentum

    def build(self, variables: Any) -> None:
        # The two averages and the weight they have so far, for the bias correction.
        self._noise = self.add_variable(name="noise")
        self._signal = self.add_variable(name="signal")
        self._weight = self.add_variable(name="weight")

    @property
    def noise(self) -> tf.Tensor:
        """The average of `S`, the variance of an example's gradient, without bias."""
        return tf.math.divide_no_nan(self._noise.value, self._weight.value)

    @property
    def signal(self) -> tf.Tensor:
        """The average of `|G|²`, the square norm of the true gradient, without bias."""
        return tf.math.divide_no_nan(self._signal.value, self._weight.value)

    def apply(self, gradients: Gradients) -> Gradients:
        parts = self._step("parts").parts
        if parts is None:
            raise ValueError(
                f"{self.name!r} compares the gradient of a batch with those of its parts, "
                "and there are none. Pass `micro_batches=2` or more to `compile`, or train "
                "under a strategy of several replicas."
            )
        parts = Parts(*(tf.cast(part, tf.float32) for part in parts))
        noise = (parts.square_norm - parts.whole_square_norm) / (
            parts.inverse - parts.whole_inverse
        )
        signal = parts.whole_square_norm - parts.whole_inverse * noise
        # Not where the batch has one part only, or a gradient is not finite.
        usable = tf.math.is_finite(noise) & tf.math.is_finite(signal)
        pairs = ((self._noise, noise), (self._signal, signal), (self._weight, 1.0))
        for average, value in pairs:
            moved = average.value + (1.0 - self.momentum) * (value - average.value)
            average.assign(tf.where(usable, moved, average.value))
        entry = "noise_scale" if self._name is None else f"{self._name}_noise_scale"
        counts = tf.cast(usable & (self.signal > 0.0), tf.float32)
        scale = tf.math.divide_no_nan(self.noise, tf.maximum(self.signal, 0.0))
        self._step("report").entries.append(LogEntry(self, entry, scale, "mean", counts))
        return gradients
