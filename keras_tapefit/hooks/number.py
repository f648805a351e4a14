"""Numbers of a hook: a float, a schedule or a callable of the step, live."""

from __future__ import annotations

import math
import numbers
from typing import Any, overload

import keras
import numpy as np
import tensorflow as tf

from keras_tapefit.hooks.step import current_step

Schedule = keras.optimizers.schedules.LearningRateSchedule


class Number:
    """An attribute of a hook that may change while the model trains.

    Outside `apply` the attribute is what was assigned: a float, a
    `keras.optimizers.schedules` schedule, or a callable of the step. Inside `apply` it
    is a scalar tensor, its value at this step. A float lives in a variable, so assigning
    another one needs no retrace.

    A number that is assigned is checked. What a schedule or a callable gives is known on
    the device only: below `minimum` or above `maximum` it counts as that bound; `neutral`
    stands for NaN, for what is not above `above`, and for an infinity where `neutral` is
    finite. With the numbers of this library's hooks a hook does nothing in such a step.

    Args:
        minimum: the smallest value allowed, itself included, or `None`.
        above: a bound that values must exceed, or `None`.
        maximum: the largest value allowed, itself included, or `None`.
        optional: whether `None` is allowed.
        neutral: with what number the hook does nothing. Infinity, for a bound, allows
            infinite ones: they are no bound. A finite one forbids them. `None`: not
            known; what cannot be used counts as the smallest number allowed, or as 0.
        dtype: of the tensor, `"float32"` or `"float64"`.

    Raises:
        TypeError: on assignment of anything but a number, a schedule or a callable.
        ValueError: on assignment of a number out of bounds.

    Example:

    ```python
    class Shrink(hooks.GradientHook):
        factor = hooks.Number(above=0)

        def __init__(self, factor, targets=None, name=None):
            super().__init__(targets=targets, name=name)
            self.factor = factor

        def apply(self, gradients):
            return gradients.scale(self.factor)
    ```
    """

    def __init__(
        self,
        *,
        minimum: float | None = None,
        above: float | None = None,
        maximum: float | None = None,
        optional: bool = False,
        neutral: float | None = None,
        dtype: str = "float32",
    ) -> None:
        self.minimum = minimum
        self.above = above
        self.maximum = maximum
        self.optional = optional
        self.neutral = neutral
        self.dtype = dtype

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, hook: None, owner: type | None = None) -> Number: ...

    # A number or a schedule outside `apply`, a tensor inside: anything else is refused.
    @overload
    def __get__(self, hook: object, owner: type | None = None) -> Any: ...

    def __get__(self, hook: Any, owner: type | None = None) -> Any:
        if hook is None:
            return self
        if self.name not in hook.__dict__:
            raise AttributeError(f"{type(hook).__name__!r} has not been given its `{self.name}`.")
        given = hook.__dict__[self.name]
        step = current_step()
        if step is None or step.hook is not hook or given is None:
            return given
        if callable(given):
            return self._usable(given(step.index))
        return tf.cast(hook._number_variables[self.name].value, self.dtype)

    def _usable(self, value: Any) -> tf.Tensor:
        """Returns what a schedule or a callable gave, within bounds."""
        if value is None or isinstance(value, str):
            raise TypeError(
                f"`{self.name}` must be a number at each step. Received: {value!r} from what was "
                "assigned to it."
            )
        value = tf.convert_to_tensor(value)
        if value.shape.rank not in (0, None):
            raise ValueError(
                f"`{self.name}` must be a scalar at each step. Received: a tensor of shape "
                f"{tuple(value.shape)} from what was assigned to it."
            )
        value = tf.cast(value, self.dtype)
        unusable = tf.math.is_nan(value)
        if self.above is not None:
            unusable |= value <= self.above
        if self.neutral is not None and math.isfinite(self.neutral):
            unusable |= ~tf.math.is_finite(value)
        if self.minimum is not None:
            value = tf.maximum(value, self.minimum)
        if self.maximum is not None:
            value = tf.minimum(value, self.maximum)
        return tf.where(unusable, tf.constant(self._stand_in(), self.dtype), value)

    def _stand_in(self) -> float:
        if self.neutral is not None:
            return self.neutral
        if self.above is not None:
            next_float = np.nextafter(self.above, np.inf, dtype=self.dtype)
            return max(float(next_float), self.above + float(np.finfo(self.dtype).tiny))
        least = 0.0 if self.minimum is None else self.minimum
        return least if self.maximum is None else min(least, self.maximum)

    def __set__(self, hook: Any, value: Any) -> None:
        self._check(value)
        before = hook.__dict__.get(self.name)
        hook.__dict__[self.name] = value
        if _is_live(value) and self.name in hook._number_variables:
            hook._number_variables[self.name].assign(_as_float(value))
        if before is not value and not (_is_live(value) and _is_live(before)):
            hook._structure += 1

    def make_variable(self, hook: Any) -> None:
        """Puts a float into a variable of the hook."""
        given = hook.__dict__.get(self.name)
        if _is_live(given) and self.name not in hook._number_variables:
            hook._number_variables[self.name] = keras.Variable(
                _as_float(given), dtype="float64", trainable=False, autocast=False, name=self.name
            )

    def _check(self, value: Any) -> None:
        if value is None and self.optional:
            return
        if callable(value):
            return
        text = f"Received: {self.name}={value!r}."
        if isinstance(value, bool) or not _is_live(value):
            raise TypeError(
                f"`{self.name}` must be a number, a `keras.optimizers.schedules` schedule "
                f"or a callable of the step. {text}"
            )
        if math.isnan(_as_float(value)):
            raise ValueError(f"`{self.name}` must not be NaN. {text}")
        if self.neutral is not None and math.isfinite(self.neutral):
            largest = float(np.finfo("float32").max)
            if abs(_as_float(value)) > largest:
                raise ValueError(f"`{self.name}` must be a number up to {largest:.3g}. {text}")
        if self.above is not None and not value > self.above:
            bound = "a positive number" if self.above == 0 else f"above {self.above}"
            raise ValueError(f"`{self.name}` must be {bound}. {text}")
        if self.minimum is not None and not value >= self.minimum:
            bound = "zero or a positive number" if self.minimum == 0 else f"at least {self.minimum}"
            raise ValueError(f"`{self.name}` must be {bound}. {text}")
        if self.maximum is not None and not value <= self.maximum:
            raise ValueError(f"`{self.name}` must be at most {self.maximum}. {text}")


def _is_live(value: Any) -> bool:
    """Whether a value is a plain number, which a variable can hold."""
    return isinstance(value, numbers.Real)


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # of a huge integer
        return math.inf if value > 0 else -math.inf


def serialize_number(value: Any) -> Any:
    """Returns a number as a config holds it."""
    if isinstance(value, numbers.Real):
        return float(value) if not isinstance(value, int) else value
    if isinstance(value, Schedule):
        return {"schedule": keras.optimizers.schedules.serialize(value)}
    return None if value is None else {"function": keras.saving.serialize_keras_object(value)}


def deserialize_number(config: Any) -> Any:
    """Returns the number that `serialize_number` described."""
    if not isinstance(config, dict):
        return config
    if "schedule" in config:
        return keras.optimizers.schedules.deserialize(config["schedule"])
    return keras.saving.deserialize_keras_object(config["function"])
