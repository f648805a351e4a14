"""Values put aside at the start of a step, for the case that it is rejected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf


class Rollback:
    """Remembers what variables hold now.

    For what a step changes outside the optimizer's update, which a branch guards:
    BatchNormalization statistics, seeds, metrics and the state of hooks.

    Args:
        variables: Keras variables, or TensorFlow's; those made later in the step are not
            covered.
    """

    def __init__(self, variables: Sequence[Any]) -> None:
        self._saved = [(v, tf.identity(_value(v))) for v in variables]

    def restore_unless(self, accepted: tf.Tensor) -> None:
        """Puts the values back where `accepted`, a scalar bool, is false."""
        for variable, before in self._saved:
            # A selection: 0 · NaN is NaN.
            variable.assign(tf.where(accepted, _value(variable), before))


def _value(variable: Any) -> Any:
    return variable if isinstance(variable, tf.Variable) else variable.value
