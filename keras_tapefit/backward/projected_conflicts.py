"""Gradients of several tasks that do not undo each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import tensorflow as tf

from keras_tapefit.backward.base import (
    Batch,
    Computed,
    GradientMethod,
    Objective,
    register,
)
from keras_tapefit.gradients import Gradients, draws
from keras_tapefit.gradients.checks import check_integer
from keras_tapefit.gradients.norms import joint_norm
from keras_tapefit.gradients.sparse import to_dense


@register
class ProjectedConflicts(GradientMethod):
    """PCGrad: takes out of each task's gradient what works against another task.

    For a model with several losses where one of them learns at another's expense. It
    takes one forward pass, and one backward pass a task.

    Formula: `g_i' = g_i`; then for the other tasks j in random order, where
    `g_i'·g_j < 0`: `g_i' ← g_i' − (g_i'·g_j)/‖g_j‖² · g_j`; the result is `Σ g_i'`.
    Products and norms are over all variables being trained. What a task does not depend
    on counts as zero there. Regularization and other losses that layers add belong to no
    task: their gradient is added once, as it is.

    On several replicas the gradients are those of the whole batch. With `micro_batches`
    the projection is made for each part separately.

    Reference: Yu et al., 2020, "Gradient surgery for multi-task learning",
    arXiv:2001.06782.

    Args:
        tasks: a function of `(y_true, y_pred)` that returns a list of scalar losses,
            each a mean over the batch. It stands in for the model's compiled loss, and
            the loss in the logs is the sum. `None`: one task for each loss that the
            model is compiled with, times its `loss_weights`.
        seed: an integer; the order depends on it and on the number of updates made.

    Raises:
        TypeError: when an argument is of the wrong type.
        ValueError: in the first step, when there are less than two tasks, or one is no
            scalar.

    Example:

    ```python
    model.compile(
        "adam",
        loss={"age": "mse", "name": "sparse_categorical_crossentropy"},
        backward=backward.ProjectedConflicts(),
    )
    ```
    """

    def __init__(
        self,
        tasks: Callable[[Any, Any], Sequence[tf.Tensor]] | None = None,
        seed: int = 0,
    ) -> None:
        if tasks is not None and not callable(tasks):
            raise TypeError(
                "`tasks` must be a function of `(y_true, y_pred)` that returns a list of "
                f"scalars. Received: tasks={tasks!r}."
            )
        check_integer("seed", seed)
        self.tasks = tasks
        self.seed = seed

    def compute(self, objective: Objective, batch: Batch) -> Computed:
        with objective.tape(persistent=True) as tape:
            losses, rest, forward = objective.tasks(batch, self.tasks)
        _check(losses)
        variables = objective.variables()
        each = [tape.gradient(loss, variables) for loss in losses]
        added = [None] * len(variables) if rest is None else tape.gradient(rest, variables)
        del tape
        # Here and not at the end: what replicas add up to is that of all of them, with an
        # example or without.
        *found, added = [_where(forward.counts, gs, variables) for gs in [*each, added]]
        used = [any(gs[i] is not None for gs in found) for i in range(len(variables))]
        chosen = [v for v, is_used in zip(variables, used, strict=True) if is_used]
        rows = [
            [_dense(g, v) for g, v, is_used in zip(gs, variables, used, strict=True) if is_used]
            for gs in found
        ]
        if objective.num_replicas() > 1:
            flat = objective.sum_over_replicas([g for row in rows for g in row])
            # Each replica's share of what is summed again later.
            flat = [g / objective.num_replicas() for g in flat]
            rows = [flat[i : i + len(chosen)] for i in range(0, len(flat), len(chosen))]
        left = iter(self._projected(rows, objective.steps()))
        total = [next(left) if is_used else None for is_used in used]
        gradients = Gradients(zip(total, variables, strict=True))
        gradients = gradients.plus(Gradients(zip(added, variables, strict=True)))
        return replace(forward, counts=None).computed([gradients.values()], variables)

    def _projected(self, rows: list[list[tf.Tensor]], step: tf.Tensor) -> list[tf.Tensor]:
        """Returns the sum of the projected gradients of the tasks, one list each."""
        num_tasks = len(rows)
        tasks = tf.stack([_flat(row) for row in rows])
        norms = tf.stack([tf.cast(joint_norm([task]), tasks.dtype) for task in tf.unstack(tasks)])
        # Along unit vectors, so that no product overflows; that of a zero task is zero.
        units = tasks / tf.where(norms > 0, norms, 1.0)[:, tf.newaxis]
        orders = tf.argsort(draws.uniform((num_tasks, num_tasks), (self.seed, step)), axis=1)
        total = tf.zeros_like(tasks[0])
        for i in range(num_tasks):
            projected = tasks[i]
            for k in range(num_tasks):
                other = orders[i, k]
                along = tf.reduce_sum(projected * units[other])
                against = (along < 0) & (other != i)
                projected -= tf.where(against, along, 0.0) * units[other]
            total += projected
        parts = tf.split(total, [g.shape.num_elements() for g in rows[0]])
        return [
            tf.cast(tf.reshape(part, g.shape), g.dtype)
            for part, g in zip(parts, rows[0], strict=True)
        ]


def _where(counts: Any, values: list[Any], variables: Sequence[Any]) -> list[Any]:
    if counts is None:
        return values
    return Gradients(zip(values, variables, strict=True)).where(counts).values()


def _dense(gradient: Any, variable: Any) -> tf.Tensor:
    if gradient is None:
        return tf.zeros(variable.shape, variable.dtype)
    return to_dense(gradient)


def _flat(row: Sequence[tf.Tensor]) -> tf.Tensor:
    dtype = tf.float64 if any(g.dtype == tf.float64 for g in row) else tf.float32
    return tf.concat([tf.cast(tf.reshape(g, [-1]), dtype) for g in row], axis=0)


def _check(losses: Sequence[Any]) -> None:
    if len(losses) < 2:
        raise ValueError(
            "`ProjectedConflicts` needs at least two losses: a model with several "
            "outputs and a loss for each, or `tasks` that returns several. "
            f"Received: {len(losses)}."
        )
    for loss in losses:
        if loss.shape.rank != 0:
            raise ValueError(
                "Each of `tasks` must be a scalar, such as `tf.reduce_mean(...)` gives. "
                f"Received: a loss of shape {tuple(loss.shape)}."
            )
