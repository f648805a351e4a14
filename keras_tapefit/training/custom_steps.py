"""A custom `train_step`, and its logs.

Keras shows the loss as 0 and anything else as the last batch's, unless the step keeps
metrics itself. Of a step that takes our tape, what it returns becomes means over the
epoch's examples. A step without our tape, and without hooks, is left as it is.

Private names used here: of a `tf.function` `_autograph` and `_jit_compile`. Checked with
Keras 3.15.1 and TensorFlow 2.21; `tests/models/test_private_names.py` fails when they
change.
"""

from __future__ import annotations

import contextlib
import functools
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from keras_tapefit.backward import Backpropagation
from keras_tapefit.hooks.step import LogEntry
from keras_tapefit.training import keras_trainer
from keras_tapefit.training.runtime import Runtime
from keras_tapefit.training.step import CustomStep, custom_step, open_step
from keras_tapefit.update import optimizers, replicas


def run(runtime: Runtime, train_step: Any, data: Any) -> Any:
    """Calls a custom step as part of an open step, and returns its logs.

    Args:
        runtime: the private side of the model.
        train_step: the bound method; one decorated with `tf.function` is traced with
            what comes before and after it.
        data: the batch.
    """
    if isinstance(train_step, tf.types.experimental.PolymorphicFunction):
        return _traced_whole(runtime, train_step)(data)
    return _run(runtime, train_step, data)


def _run(runtime: Runtime, train_step: Callable[[Any], Any], data: Any) -> Any:
    with custom_step(runtime, data) as step:
        logs = _complete_logs(step, train_step(data))
        _check(step)
        return step.close(logs)


def _traced_whole(runtime: Runtime, train_step: Any) -> Callable[[Any], Any]:
    """Returns the step as one `tf.function` with all that belongs to it."""
    inner = train_step.python_function
    if train_step._autograph:
        # TensorFlow binds methods weakly, in its own wrapper.
        method = getattr(inner, "__wrapped__", None)
        if isinstance(method, types.MethodType):
            inner = functools.partial(tf.autograph.to_graph(method.__func__), runtime.model)
        else:
            inner = tf.autograph.to_graph(inner)

    def whole(data: Any) -> Any:
        return _run(runtime, inner, data)

    if tf.inside_function() and not train_step._jit_compile:
        # Replicas cannot meet in a function inside of the one they run in.
        return whole
    return tf.function(whole, autograph=False, jit_compile=train_step._jit_compile)


@contextlib.contextmanager
def listening(runtime: Runtime) -> Iterator[None]:
    """Has metrics and optimizer of a model tell the open step what is done with them."""
    model, optimizer = runtime.model, runtime.optimizer
    tracker = keras_trainer.loss_tracker(model)
    methods: list[Any] = [(metric, "result", _keep_result) for metric in model.metrics]
    if tracker is not None:
        methods.append((tracker, "update_state", _marking("tracked_loss")))
    if optimizers.has_loss_scale(optimizer):
        methods.append((optimizer, "scale_loss", _marking("scaled_loss")))
        methods.append((optimizer, "apply", _marking("applied")))
    patched = [m for m in methods if m[1] not in m[0].__dict__]
    for owner, name, note in patched:
        # Past Keras's attribute tracking.
        owner.__dict__[name] = _told(runtime, getattr(owner, name), note)
    try:
        yield
    finally:
        for owner, name, _ in patched:
            owner.__dict__.pop(name, None)


def _keep_result(step: CustomStep, value: Any) -> None:
    step.results.append(value)


def _marking(name: str) -> Callable[[Any, Any], None]:
    return lambda step, _: setattr(step, name, True)


def _told(runtime: Runtime, method: Any, note: Callable[[Any, Any], None]) -> Any:
    def telling(*args: Any, **kwargs: Any) -> Any:
        value = method(*args, **kwargs)
        step = open_step(runtime)
        if step is not None:
            note(step, value)
        return value

    return telling


def _complete_logs(step: CustomStep, logs: Any) -> Any:
    """Takes what a step returned into the epoch's means."""
    model = step.runtime.model
    if not step.used_tape or not isinstance(logs, dict):
        return logs
    tracker = keras_trainer.loss_tracker(model)
    is_tracked = any(metric is tracker for metric in model.metrics)
    if "loss" in logs and is_tracked and not step.tracked_loss:
        # The tracker's own result, without an update, is what `compute_metrics` gives.
        loss = step.loss if _is_result(step, logs["loss"]) else logs["loss"]
        if loss is not None:
            keras_trainer.update_tracker(model, loss, step.examples)
            logs = {**logs, "loss": tracker.result()}
    known = model.get_metrics_result()
    extra = {
        name: value
        for name, value in logs.items()
        if name not in known and not _is_result(step, value) and _is_scalar(value)
    }
    if extra:
        total = replicas.sum_over(step.examples)
        for name, value in extra.items():
            share = tf.math.multiply_no_nan(tf.cast(value, tf.float32), step.examples)
            mean = tf.math.divide_no_nan(replicas.sum_over(share), total)
            step.report(LogEntry(model, name, mean, "mean", total))
    return logs


def _check(step: CustomStep) -> None:
    """Says what a step does without, that the model was compiled for.

    Raises:
        ValueError: when it is compiled with a way to compute gradients that it passes by.
    """
    runtime = step.runtime
    model = runtime.model
    name = type(model).__name__
    is_plain = type(runtime.backward) is Backpropagation and runtime.micro_batches == 1
    if not is_plain and not step.used_method:
        raise ValueError(
            f"The model is compiled with `backward=` or `micro_batches=`, and the `train_step` "
            f"of {name} computes gradients itself, so these do nothing. Call "
            "`super().train_step(data)` in it, override `compute_loss` instead, or leave "
            "the arguments out."
        )
    if runtime.hooks.of_outputs and not step.used_tape and not step.used_method:
        raise ValueError(
            f"The hook {runtime.hooks.of_outputs[0].name!r} looks at what layers return, and "
            f"the `train_step` of {name} runs them without the model's tape. Compute the loss "
            "inside `with self.gradient_tape() as tape:`, or remove the hook."
        )
    if runtime.hooks and not step.updated:
        names = ", ".join(repr(hook.name) for hook in runtime.hooks)
        warnings.warn(
            f"The `train_step` of {name} updates weights without the gradient hooks {names}: "
            "they do nothing. Compute the loss inside "
            "`with self.gradient_tape() as tape:` and call `tape.minimize(loss)`, or "
            "pass the gradients to `self.apply_gradients(...)`.",
            stacklevel=2,
        )
    unscaled = step.applied and not step.scaled_loss and not step.updated
    if unscaled and optimizers.has_loss_scale(runtime.optimizer):
        kind = type(runtime.optimizer).__name__
        warnings.warn(
            f"The `train_step` of {name} never scales the loss, but its "
            f"optimizer, a {kind}, divides the gradients by the loss scale, so training is as "
            "good as standing still. Take the gradients of "
            "`self.optimizer.scale_loss(loss)`, or compute the loss inside "
            "`with self.gradient_tape() as tape:` and call `tape.minimize(loss)`.",
            stacklevel=2,
        )


def _is_result(step: CustomStep, value: Any) -> bool:
    return any(value is result for result in step.results)


def _is_scalar(value: Any) -> bool:
    if isinstance(value, bool | int | float):
        return True
    return tf.is_tensor(value) and value.shape.rank == 0 and value.dtype != tf.string
