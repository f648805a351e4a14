"""The logs of a `train_step` of a user's own that takes our tape.

Keras shows the loss as 0 and anything else as the last batch's, unless the step keeps
metrics itself. Here what it returns becomes means over the epoch's examples.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from keras_tapefit.hooks.step import Report
from keras_tapefit.training import keras_trainer
from keras_tapefit.training.runtime import Runtime
from keras_tapefit.training.scope import StepScope, open_scope
from keras_tapefit.update import optimizers, replicas


@contextlib.contextmanager
def listening(runtime: Runtime) -> Iterator[None]:
    """Has metrics and optimizer of a model tell the open step what is done with them."""
    tracker = keras_trainer.loss_tracker(runtime.model)
    methods = [(metric, "result", _note_result) for metric in runtime.model.metrics]
    if tracker is not None:
        methods.append((tracker, "update_state", _note_tracked))
    optimizer = getattr(runtime.model, "optimizer", None)
    if optimizers.has_loss_scale(optimizer):
        methods.append((optimizer, "scale_loss", _note_scaled))
    if optimizers.has_loss_scale(optimizer) or runtime.window is not None:
        methods.append((optimizer, "apply", _note_applied))
    patched = [m for m in methods if m[1] not in m[0].__dict__]
    for metric, name, note in patched:
        # Past Keras's attribute tracking.
        metric.__dict__[name] = _told(runtime, getattr(metric, name), note)
    try:
        yield
    finally:
        for metric, name, _ in patched:
            metric.__dict__.pop(name, None)


def complete_logs(scope: StepScope, logs: Any, data: Any) -> Any:
    """Takes what a step returned into the epoch's means.

    Args:
        scope: of the step.
        logs: what the step returned.
        data: the batch.

    Returns:
        The logs with the mean loss; the other means are reported at the step's end.
    """
    model = scope.runtime.model
    if not scope.used_tape or not isinstance(logs, dict):
        return logs
    tracker = keras_trainer.loss_tracker(model)
    is_tracked = any(metric is tracker for metric in model.metrics)
    weight = batch_size(data)
    if "loss" in logs and is_tracked and not scope.tracked_loss:
        # The tracker's own result, without an update, is what `compute_metrics` gives.
        loss = scope.loss if _is_result(scope, logs["loss"]) else logs["loss"]
        if loss is not None:
            keras_trainer.update_tracker(model, loss, weight)
            logs = {**logs, "loss": tracker.result()}
    known = model.get_metrics_result()
    extra = {
        name: value
        for name, value in logs.items()
        if name not in known and not _is_result(scope, value) and _is_scalar(value)
    }
    if extra:
        total = replicas.sum_over(tf.cast(weight, tf.float32))
        for name, value in extra.items():
            share = tf.cast(value, tf.float32) * tf.cast(weight, tf.float32)
            mean = tf.math.divide_no_nan(replicas.sum_over(share), total)
            scope.add_report(Report(model, name, mean, "mean", total))
    return logs


def warn_of_scale(scope: StepScope) -> None:
    """Says where a step took gradients of a loss that it did not scale."""
    model = scope.runtime.model
    if not scope.applied or scope.scaled_loss or scope.updated:
        return
    if not optimizers.has_loss_scale(model.optimizer):
        return
    kind = type(model.optimizer).__name__
    warnings.warn(
        f"The `train_step` of {type(model).__name__} never scales the loss, but its "
        f"optimizer, a {kind}, divides the gradients by the loss scale, so training is as "
        "good as standing still. Take the gradients of "
        "`self.optimizer.scale_loss(loss)`, or compute the loss inside "
        "`with self.gradient_tape() as tape:` and call `tape.minimize(loss)`.",
        stacklevel=2,
    )


def check_accumulation(scope: StepScope) -> None:
    """Refuses a step that calls an optimizer whose accumulation was taken from it.

    Raises:
        ValueError: where it does, since each of its steps would be an update.
    """
    window = scope.runtime.window
    if window is None or not scope.applied or scope.updated:
        return
    raise ValueError(
        f"The `train_step` of {type(scope.runtime.model).__name__} calls the optimizer by "
        f"itself, past its `gradient_accumulation_steps={window.num_steps}`, which belong "
        "to the model here. Compute the loss inside `with self.gradient_tape() as tape:` "
        "and call `tape.minimize(loss)`, or pass the gradients to "
        "`self.apply_gradients(...)`."
    )


def _told(runtime: Runtime, method: Any, note: Any) -> Any:
    def telling(*args: Any, **kwargs: Any) -> Any:
        value = method(*args, **kwargs)
        scope = open_scope(runtime)
        if scope is not None:
            note(scope, value)
        return value

    return telling


def _note_result(scope: StepScope, value: Any) -> None:
    scope.results.append(value)


def _note_scaled(scope: StepScope, value: Any) -> None:
    scope.scaled_loss = True


def _note_applied(scope: StepScope, value: Any) -> None:
    scope.applied = True


def _note_tracked(scope: StepScope, value: Any) -> None:
    scope.tracked_loss = True


def _is_result(scope: StepScope, value: Any) -> bool:
    return any(value is result for result in scope.results)


def _is_scalar(value: Any) -> bool:
    if isinstance(value, bool | int | float):
        return True
    return tf.is_tensor(value) and value.shape.rank == 0 and value.dtype != tf.string


def batch_size(data: Any) -> Any:
    """Returns the number of examples in a batch; 1 where it has no arrays of examples."""
    first = keras_trainer.first_array(data)
    return 1 if first is None or first.shape.rank == 0 else tf.shape(first)[0]
