"""Gates: steps that are not to be applied."""

from typing import Any

import keras
import tensorflow as tf

from keras_tapefit.gradients import Gradients, Targets, variable_path
from keras_tapefit.gradients.sparse import values_of
from keras_tapefit.hooks.base import GradientHook


@keras.saving.register_keras_serializable("keras_tapefit")
class SkipNonFinite(GradientHook):
    """Skips a step whose gradients hold NaN or an infinity.

    A skipped step leaves nothing behind: weights, optimizer, BatchNormalization
    statistics, random seeds, metrics and hook state are what they were. The logs get
    `skipped_steps`, the number of steps skipped in the epoch.

    Put it before hooks that look at the values of the gradients.

    Args:
        max_consecutive: after this many skipped steps in a row `fit` stops with a
            `FloatingPointError` that names the variable and the step where it began.
            `None`: never.
        targets: the variables to look at; `None`: all.
        name: the hook's name.

    Raises:
        TypeError, ValueError: when `max_consecutive` is no positive integer.
        FloatingPointError: while training, see `max_consecutive`.

    Example:

    ```python
    model.register_gradient_hook(hooks.SkipNonFinite(max_consecutive=20))
    ```
    """

    may_skip_steps = True

    def __init__(
        self,
        max_consecutive: int | None = None,
        targets: Targets = None,
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, name=name)
        if max_consecutive is not None:
            if isinstance(max_consecutive, bool) or not isinstance(max_consecutive, int):
                raise TypeError(
                    "`max_consecutive` must be an integer or None. "
                    f"Received: max_consecutive={max_consecutive!r}."
                )
            if max_consecutive < 1:
                raise ValueError(
                    "`max_consecutive` must be at least 1. "
                    f"Received: max_consecutive={max_consecutive}."
                )
        self.max_consecutive = max_consecutive

    def build(self, variables: Any) -> None:
        def counter(name: str) -> keras.Variable:
            return self.add_variable(dtype="int64", name=name, kept_when_skipped=True)

        self._watched = list(variables)
        self._consecutive = counter("consecutive")
        self._seen = counter("steps_seen")
        # Of the step that began the present run of skipped ones:
        self._first_variable = counter("first_variable")
        self._first_step = counter("first_step")

    def apply(self, gradients: Gradients) -> Gradients:
        present = [(g, v) for g, v in gradients.pairs() if g is not None]
        if not present:
            return gradients
        finite = tf.stack(
            [tf.reduce_all(tf.math.is_finite(values_of(g))) for g, _ in present]
        )
        bad = ~tf.reduce_all(finite)
        places = {id(v): i for i, v in enumerate(self._watched)}
        culprits = tf.constant([places[id(v)] for _, v in present], tf.int64)
        begins = bad & (self._consecutive.value == 0)
        culprit = culprits[tf.argmin(tf.cast(finite, tf.int32))]
        self._first_variable.assign(tf.where(begins, culprit, self._first_variable.value))
        self._first_step.assign(tf.where(begins, self._seen.value, self._first_step.value))
        self._consecutive.assign(tf.where(bad, self._consecutive.value + 1, 0))
        self._seen.assign(self._seen.value + 1)
        self.skip_step(bad)
        return gradients

    def check_state(self) -> None:
        if self.max_consecutive is None or self._built_for is None:
            return
        consecutive = int(self._consecutive.numpy())
        if consecutive < self.max_consecutive:
            return
        path = variable_path(self._watched[int(self._first_variable.numpy())])
        step = int(self._first_step.numpy())
        self._consecutive.assign(0)
        raise FloatingPointError(
            f"The gradients of {consecutive} steps in a row were not finite, beginning "
            f"with {path!r} at step {step} (counted from 0). The weights are those from "
            "before that step. Look for a too large learning rate, a logarithm or "
            "division without a floor, or bad data."
        )
