"""Numbers of a hook: a float, a schedule or a callable of the step, live."""

from __future__ import annotations

import math
import numbers
from typing import Any

import keras
import tensorflow as tf

from keras_tapefit.hooks.step import current_step

Schedule = keras.optimizers.schedules.LearningRateSchedule


class Number:
    """An attribute of a hook that may change while the model trains.

    Outside `apply` the attribute is what was assigned: a float, a
    `keras.optimizers.schedules` schedule, or a callable of the step. Inside `apply` it
    is a scalar float32 tensor, its value at this step. A float lives in a variable, so
    assigning another one needs no retrace.

    Args:
        minimum: the smallest value allowed, itself included, or `None`.
        above: a bound that values must exceed, or `None`.
        maximum: the largest value allowed, itself included, or `None`.
        optional: whether `None` is allowed.

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
    ) -> None:
        self.minimum = minimum
        self.above = above
        self.maximum = maximum
        self.optional = optional

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

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
            return tf.cast(given(step.index), tf.float32)
        return tf.convert_to_tensor(hook._number_variables[self.name].value)

    def __set__(self, hook: Any, value: Any) -> None:
        self._check(value)
        before = hook.__dict__.get(self.name)
        hook.__dict__[self.name] = value
        if _is_live(value) and self.name in hook._number_variables:
            hook._number_variables[self.name].assign(float(value))
        if before is not value and not (_is_live(value) and _is_live(before)):
            hook._structure += 1

    def make_variable(self, hook: Any) -> None:
        """Puts a float into a variable of the hook."""
        given = hook.__dict__.get(self.name)
        if _is_live(given) and self.name not in hook._number_variables:
            hook._number_variables[self.name] = keras.Variable(
                float(given), dtype="float32", trainable=False, autocast=False, name=self.name
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
        if math.isnan(float(value)):
            raise ValueError(f"`{self.name}` must not be NaN. {text}")
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
