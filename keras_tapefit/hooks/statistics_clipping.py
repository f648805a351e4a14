"""Clipping by what the norm was in the steps before."""

from __future__ import annotations

import math
from typing import Any

import keras
import tensorflow as tf

from keras_tapefit.gradients import Gradients, Targets
from keras_tapefit.gradients.checks import check_count
from keras_tapefit.hooks.clipping import ClippingHook, shorten
from keras_tapefit.hooks.number import Number
from keras_tapefit.hooks.statistics import Moments, finite_norm


@keras.saving.register_keras_serializable("keras_tapefit")
class PercentileClipping(ClippingHook):
    """Scales all gradients down together to a percentile of their past norms (AutoClip).

    Where no good bound for `GlobalNormClipping` is known, or where it changes in the
    course of the training. With the default most steps are clipped, to the size of the
    smaller ones.

    Formula: the norm `‖g‖` joins the history, `η` is the percentile of the history with
    linear interpolation, `g ← g · min(1, η / ‖g‖)`. Where `η` is 0, after gradients of
    zero, nothing is clipped. A norm of elements that are not finite does not join, and
    its gradients are left as they are, for a gate to see.

    Reference: Seetharaman et al., 2020, "AutoClip: adaptive gradient clipping for source
    separation networks", arXiv:2007.14469.

    Args:
        percentile: from 0 to 100; a number, a schedule or a callable of the step.
        history: the number of steps remembered; a positive integer.
        targets: the variables the norm is taken over; `None`: all.
        name: the hook's name.
        log_clipped: whether to log the share of steps that were clipped, as `clipped_steps`,
            or `<name>_clipped_steps` when a name is given.

    Raises:
        TypeError, ValueError: when an argument is out of range.

    Example:

    ```python
    model.register_gradient_hook(hooks.PercentileClipping(percentile=25, history=500))
    ```
    """

    percentile = Number(minimum=0, maximum=100, neutral=100)

    def __init__(
        self,
        percentile: Any = 10,
        history: int = 1000,
        targets: Targets = None,
        name: str | None = None,
        log_clipped: bool = False,
    ) -> None:
        super().__init__(targets=targets, name=name, log_clipped=log_clipped)
        check_count("history", history)
        self.percentile = percentile
        self.history = history

    def build(self, variables: Any) -> None:
        self._norms = self.add_variable((self.history,), name="norms")
        self._count = self.add_variable(dtype="int64", name="count")

    def clip(self, gradients: Gradients) -> Gradients:
        norm, joins = finite_norm(gradients)
        places = tf.range(self.history, dtype=tf.int64)
        here = joins & (places == self._count.value % self.history)
        norms = tf.where(here, norm, self._norms.value)
        count = self._count.value + tf.cast(joins, tf.int64)
        self._norms.assign(norms)
        self._count.assign(count)
        bound = _percentile(norms, tf.minimum(count, self.history), self.percentile)
        clips = joins & (norm > bound) & (bound > 0.0)
        return shorten(gradients, [None] * len(gradients), {None: tf.where(clips, bound, math.inf)})


def _percentile(values: tf.Tensor, num_values: tf.Tensor, percentile: tf.Tensor) -> tf.Tensor:
    """Returns a percentile of the first values, which are at least one, interpolated."""
    places = tf.range(values.shape[0], dtype=tf.int64)
    ordered = tf.sort(tf.where(places < num_values, values, values.dtype.max))
    last = tf.cast(tf.maximum(num_values, 1) - 1, tf.float32)
    position = percentile / 100.0 * last
    below = tf.floor(position)
    low = tf.gather(ordered, tf.cast(below, tf.int32))
    high = tf.gather(ordered, tf.cast(tf.minimum(below + 1.0, last), tf.int32))
    return low + (position - below) * (high - low)


@keras.saving.register_keras_serializable("keras_tapefit")
class ZScoreClipping(ClippingHook):
    """Scales all gradients down together where their norm is a statistical outlier (ZClip).

    For large models whose loss spikes now and then: usual steps pass untouched, whatever
    their size, and an outlier is cut to a size that is the smaller the farther out it is.

    Formula: the norms `n` of the warm-up give mean `μ` and variance `σ²`. Afterwards
    `z = (n − μ) / (σ + 1e-6)`; where `z > z_max` the norm becomes
    `n' = μ + z_max² · σ / z`, else `n' = n`; then `μ ← αμ + (1 − α)n'` and
    `σ² ← ασ² + (1 − α)(n' − μ)²`. Nothing is clipped in the warm-up, nor where `n'` would
    be 0. A norm of elements that are not finite changes no statistics, and its gradients
    are left as they are.

    Reference: Kumar et al., 2025, "ZClip: adaptive spike mitigation for LLM
    pre-training", arXiv:2504.02507.

    Args:
        max_zscore: `z_max`, a positive number, a schedule or a callable of the step.
        momentum: `α`, from 0 to 1.
        num_warmup_steps: the number of steps in the warm-up; a positive integer.
        targets: the variables the norm is taken over; `None`: all.
        name: the hook's name.
        log_clipped: whether to log the share of steps that were clipped, as `clipped_steps`,
            or `<name>_clipped_steps` when a name is given.

    Raises:
        TypeError, ValueError: when an argument is out of range.

    Example:

    ```python
    model.register_gradient_hook(hooks.ZScoreClipping(max_zscore=2.5))
    ```
    """

    max_zscore = Number(above=0, neutral=math.inf)
    momentum = Number(minimum=0, maximum=1, neutral=1)

    def __init__(
        self,
        max_zscore: Any = 2.5,
        momentum: Any = 0.97,
        num_warmup_steps: int = 25,
        targets: Targets = None,
        name: str | None = None,
        log_clipped: bool = False,
    ) -> None:
        super().__init__(targets=targets, name=name, log_clipped=log_clipped)
        check_count("num_warmup_steps", num_warmup_steps)
        self.max_zscore = max_zscore
        self.momentum = momentum
        self.num_warmup_steps = num_warmup_steps

    def build(self, variables: Any) -> None:
        self._moments = Moments(self, self.num_warmup_steps)

    def clip(self, gradients: Gradients) -> Gradients:
        moments, max_zscore = self._moments, self.max_zscore
        norm, finite = finite_norm(gradients)
        zscore = moments.zscore(norm)
        bound = moments.mean + tf.square(max_zscore) * (moments.stddev / zscore)
        is_outlier = moments.ready & (zscore > max_zscore) & finite & (bound > 0.0)
        moments.add(tf.where(is_outlier, bound, norm), self.momentum, when=finite)
        bounds = {None: tf.where(is_outlier, bound, math.inf)}
        return shorten(gradients, [None] * len(gradients), bounds)
