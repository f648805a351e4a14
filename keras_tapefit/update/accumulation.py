"""Gradients accumulated over steps: `gradient_accumulation_steps`, made right.

Keras's own counts schedules, averages and `iterations` per step instead of per update,
weighs unequal batches alike, carries leftovers into the next epoch, and lets one NaN
into the whole window. Here the window is kept outside the optimizer, which sees one
gradient an update.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_tapefit.gradients import Gradients
from keras_tapefit.gradients.sparse import to_dense
from keras_tapefit.update import replicas


class Accumulation:
    """The gradients of the steps since the last update, one copy per replica.

    To be made in the strategy's scope.

    Args:
        variables: all that may ever be trained.
        num_steps: the number of steps an update is made of.

    Attributes:
        missing: for each variable being trained whether the loss does not depend on it.
        has_loss: whether the losses of the steps are known.
    """

    def __init__(self, variables: Sequence[Any], num_steps: int) -> None:
        self.num_steps = num_steps
        self.missing: list[bool] = []
        self.has_loss = False
        self._sums = {id(v): _zeros(v.shape, f"sum_{i}") for i, v in enumerate(variables)}
        self._loss = _zeros((), "loss")
        self._weight = _zeros((), "weight")
        self._steps = _zeros((), "steps")

    @property
    def variables(self) -> list[Any]:
        """The state."""
        return [*self._sums.values(), self._loss, self._weight, self._steps]

    def add(
        self,
        gradients: Gradients,
        weight: tf.Tensor,
        accepted: tf.Tensor | None,
        loss: Any = None,
    ) -> None:
        """Adds the gradients of one step.

        Args:
            gradients: of this replica, without loss scale.
            weight: scalar, what the step counts for: its number of examples.
            accepted: scalar bool; a rejected step counts for nothing. `None`: accepted.
            loss: this replica's share of the loss, where it is known.
        """
        terms = [(self._sums[id(v)], to_dense(g)) for g, v in gradients.pairs() if g is not None]
        self.has_loss = loss is not None
        if self.has_loss:
            terms.append((self._loss, loss))
        for sums, value in terms:
            # A replica without an example may have numbers that are none.
            added = tf.math.multiply_no_nan(tf.cast(value, tf.float32), weight)
            total = sums.value + added
            sums.assign(total if accepted is None else tf.where(accepted, total, sums.value))
        counted = weight if accepted is None else tf.where(accepted, weight, 0.0)
        self._weight.assign(self._weight.value + counted)
        self._steps.assign(self._steps.value + 1.0)

    def is_full(self) -> tf.Tensor:
        """Returns whether there are steps enough for an update, a scalar bool."""
        return self._steps.value >= float(self.num_steps)

    def is_started(self) -> tf.Tensor:
        """Returns whether any step counts so far, the same on every replica."""
        return replicas.sum_over(self._weight.value) > 0.0

    def mean(self, like: Sequence[Any], missing: Sequence[bool]) -> Gradients:
        """Returns the mean gradient.

        Args:
            like: the variables being trained.
            missing: for each whether the loss does not depend on it.
        """
        factor = self._factor()
        return Gradients(
            [
                (None if gone else tf.cast(self._sums[id(v)].value * factor, v.dtype), v)
                for v, gone in zip(like, missing, strict=True)
            ]
        )

    def mean_loss(self) -> tf.Tensor | None:
        """Returns this replica's share of the mean loss, where it is known."""
        if not self.has_loss:
            return None
        return self._loss.value * self._factor()

    def _factor(self) -> tf.Tensor:
        # Replicas count by their weights too; their sums are added up afterwards.
        total = replicas.sum_over(self._weight.value)
        return tf.math.divide_no_nan(float(replicas.count()), total)

    def as_part(self, mean: Gradients) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Returns norm and weight of this replica's window, each `[1]`, and its share."""
        share = self._factor() * self._weight.value
        norm = tf.math.divide_no_nan(tf.cast(mean.global_norm(), tf.float32), share)
        return tf.reshape(norm, [1]), tf.reshape(self._weight.value, [1]), share

    def clear(self) -> None:
        """Begins a new window."""
        for variable in self.variables:
            variable.assign(tf.zeros(variable.shape))


def _zeros(shape: Any, name: str) -> Any:
    return keras.Variable(
        tf.zeros(shape),
        dtype="float32",
        trainable=False,
        autocast=False,
        aggregation="none",
        name=name,
    )
