"""Shaping: gradients scaled, centred, or noise added to them."""

import random
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_tapefit.gradients import Gradients, Targets, draws
from keras_tapefit.gradients.norms import wide
from keras_tapefit.hooks.base import GradientHook
from keras_tapefit.hooks.number import Number


@keras.saving.register_keras_serializable("keras_tapefit")
class GradientScaling(GradientHook):
    """Multiplies gradients by a factor.

    For SGD this is a learning rate of its own for the targets. It is not one for Adam
    and similar optimizers, whose step does not depend on the gradient's scale.

    Args:
        factor: a number, a schedule or a callable of the step.
        targets: the variables to scale; `None`: all.
        name: the hook's name.

    Example:

    ```python
    model.register_gradient_hook(hooks.GradientScaling(0.1), targets="backbone/*")
    ```
    """

    factor = Number(neutral=1, dtype="float64")

    def __init__(self, factor: Any, targets: Targets = None, name: str | None = None) -> None:
        super().__init__(targets=targets, name=name)
        self.factor = factor

    def apply(self, gradients: Gradients) -> Gradients:
        return gradients.scale(self.factor)


@keras.saving.register_keras_serializable("keras_tapefit")
class GradientNoise(GradientHook):
    """Adds Gaussian noise that gets smaller from step to step.

    Helps very deep or badly initialised networks out of poor regions. The noise depends
    on the seed and the step only: every replica draws the same, and a resumed run draws
    what the uninterrupted one would have drawn.

    Formula: `g ← g + N(0, σ_t²)`, `σ_t² = stddev² / (1 + t)^decay`, t from 0.

    Reference: Neelakantan et al., 2015, "Adding gradient noise improves learning for
    very deep networks", arXiv:1511.06807.

    Args:
        stddev: standard deviation of the noise at step 0, in units of the gradient; a
            number, a schedule or a callable of the step. The paper's `η` is `stddev²`.
        decay: the exponent, 0.55 in the paper; 0 keeps the noise as it is.
        seed: an integer, or `None` for one drawn when the hook is built, and saved.
        targets: the variables to add noise to; `None`: all.
        name: the hook's name.

    Raises:
        TypeError: when `seed` is no integer.
        ValueError: when `stddev` or `decay` is negative.

    Example:

    ```python
    model.register_gradient_hook(hooks.GradientNoise(stddev=0.1, seed=0))
    ```
    """

    stddev = Number(minimum=0, neutral=0)
    decay = Number(minimum=0, neutral=0)

    def __init__(
        self,
        stddev: Any,
        decay: Any = 0.55,
        seed: int | None = None,
        targets: Targets = None,
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, name=name)
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
            raise TypeError(f"`seed` must be an integer or None. Received: seed={seed!r}.")
        self.stddev = stddev
        self.decay = decay
        self.seed = seed

    def build(self, variables: Any) -> None:
        seed = random.getrandbits(31) if self.seed is None else self.seed
        streams = np.random.SeedSequence([abs(seed), seed < 0]).generate_state(len(variables))
        self._streams = self.add_variable(
            initializer=(streams >> 1).astype("int32"), dtype="int32", name="streams"
        )

    def apply(self, gradients: Gradients) -> Gradients:
        time = tf.cast(self.step, tf.float32)
        stddev = self.stddev / tf.pow(1.0 + time, self.decay / 2.0)

        def add_noise(gradient: tf.Tensor, variable: Any) -> tf.Tensor:
            stream = self._streams.value[self.place(variable)]
            noise = draws.normal(variable.shape, (stream, self.step))
            noisy = gradient + tf.cast(stddev * noise, gradient.dtype)
            # Not a sum with 0: it loses the smallest floats.
            return tf.where(stddev > 0.0, noisy, gradient)

        return gradients.map(add_noise, gradients.variables)


@keras.saving.register_keras_serializable("keras_tapefit")
class Centralization(GradientHook):
    """Subtracts from the gradient of each unit of a kernel its mean over the fan-in.

    A regularizer for convolutional and dense kernels that costs almost nothing. Biases,
    normalization weights and embeddings stay as they are. The fan-in axes come from the
    layer's class, never from the rank of the variable.

    Formula: `g_i ← g_i − mean(g_i)` for each output unit i.

    Reference: Yong et al., 2020, "Gradient centralization: a new optimization technique
    for deep neural networks", arXiv:2004.01461.

    Args:
        targets: the variables to centre; `None`: all kernels.
        name: the hook's name.

    Example:

    ```python
    model.register_gradient_hook(hooks.Centralization())
    ```
    """

    def apply(self, gradients: Gradients) -> Gradients:
        def center(gradient: tf.Tensor, unit: Any) -> tf.Tensor:
            if not (unit.is_kernel and unit.axes):
                return gradient
            mean = tf.reduce_mean(wide(gradient), unit.axes, keepdims=True)
            return tf.cast(wide(gradient) - mean, gradient.dtype)

        units = [self.unit(v) for v in gradients.variables]
        return gradients.map(center, units, keeps_zero=[not u.is_kernel for u in units])
