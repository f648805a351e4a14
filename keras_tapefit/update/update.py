"""The second half of a step: from gradients to weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from keras_tapefit.gradients import Gradients
from keras_tapefit.gradients.sparse import to_dense
from keras_tapefit.hooks import HookList
from keras_tapefit.hooks.step import Parts, Report, Step
from keras_tapefit.update import optimizers, replicas
from keras_tapefit.update.accumulation import Accumulation
from keras_tapefit.update.watch import Seen, Watch


@dataclass
class Outcome:
    """What a step left for the logs.

    Attributes:
        accepted: scalar bool, whether the step was applied; `None`: always.
        reports: what the hooks reported.
        seen: what a record of the step needs, where one is asked for.
    """

    accepted: tf.Tensor | None
    reports: list[Report]
    seen: Seen | None = None


Settle = Callable[[Callable[[], Outcome]], None]


def may_reject(optimizer: Any, hooks: HookList) -> bool:
    """Whether a step with these hooks can be skipped as a whole."""
    return hooks.may_skip_steps or (len(hooks) > 0 and optimizers.is_dynamic(optimizer))


def update(
    gradients: Gradients,
    optimizer: Any,
    hooks: HookList,
    scaled: bool,
    loss: Any = None,
    parts: Any = None,
    watch: Watch | None = None,
) -> Outcome:
    """Takes gradients through replicas, loss scale, hooks, gate and optimizer.

    Steps 4 to 9 of a step. Without hooks and on one replica it is
    `optimizer.apply_gradients`, as Keras's own `train_step` calls it.

    Args:
        gradients: of the variables being trained, as the backward pass gives them.
        optimizer: a built Keras optimizer.
        hooks: built hooks.
        scaled: whether the gradients are those of the loss times the loss scale.
        loss: this replica's share of the loss, where it is known.
        parts: norms and weights of the gradients of the micro-batches, and by how much
            more than the others this replica counts, if there are any.
        watch: looks at the update, for a record of the step.

    Returns:
        What became of the step.
    """
    variables = gradients.variables
    scale = optimizers.loss_scale(optimizer)
    if not hooks and replicas.count() == 1:
        if not scaled and scale is not None:
            gradients = gradients.scale(scale)
        if watch is not None:
            return _apply_watched(optimizer, gradients, scale, watch)
        optimizers.apply(optimizer, gradients.values(), variables)
        return Outcome(None, [])

    of_parts = _parts(gradients, parts, scale if scaled else None) if hooks.uses_parts else None
    gradients = replicas.all_reduce(gradients)
    if hooks:
        gradients = gradients.with_unique_rows()
    dynamic = optimizers.is_dynamic(optimizer)
    finite = gradients.all_finite() if dynamic else None
    if scaled and scale is not None:
        gradients = gradients.scale(1.0 / tf.cast(scale, tf.float32))

    step = Step(index=tf.cast(optimizer.iterations, tf.int64))
    if hooks.uses_loss and loss is not None:
        step.loss = tf.cast(replicas.sum_over(loss), tf.float32)
    if of_parts is not None:
        whole = tf.square(tf.cast(gradients.global_norm(), tf.float32))
        step.parts = Parts(of_parts[0], of_parts[1], whole, of_parts[2])
    if watch is not None:
        watch.given(gradients)
    gradients = hooks.run(gradients, step)
    admitted = _verdict(step)
    if watch is not None:
        watch.made(gradients)
        watch.updating(variables)

    if dynamic:
        # A step that overflowed stays so whatever the hooks made of it: the optimizer
        # then skips it and halves the scale by itself.
        gradients = gradients.scale(tf.where(finite, scale, float("nan")))
    after_update = hooks.watch_update(variables, step)
    _apply(optimizer, gradients, admitted if not dynamic else _or_not(admitted, finite))
    if hooks.watches_update:
        with optimizers.averages_following(optimizer, variables):
            after_update()
    accepted = _and(admitted, finite if hooks else None)
    if watch is None:
        return Outcome(accepted, step.reports)
    watch.updated(variables)
    return Outcome(accepted, step.reports, watch.seen(_and(admitted, finite)))


def _apply_watched(optimizer: Any, gradients: Gradients, scale: Any, watch: Watch) -> Outcome:
    """Does what Keras's own step does, and looks on."""
    variables = gradients.variables
    finite = gradients.all_finite() if optimizers.is_dynamic(optimizer) else None
    true = gradients if scale is None else gradients.scale(1.0 / tf.cast(scale, tf.float32))
    watch.given(true)
    watch.made(true)
    watch.updating(variables)
    optimizers.apply(optimizer, gradients.values(), variables)
    watch.updated(variables)
    return Outcome(None, [], watch.seen(finite))


def accumulate(
    gradients: Gradients,
    optimizer: Any,
    hooks: HookList,
    scaled: bool,
    accumulation: Accumulation,
    weight: tf.Tensor,
    settle: Settle,
    loss: Any = None,
    watch: Watch | None = None,
) -> Outcome:
    """Adds gradients to the window, and makes the update where it is full.

    Args:
        gradients: of the variables being trained, of this replica.
        optimizer: a built Keras optimizer.
        hooks: built hooks; they see the mean of the window.
        scaled: whether the gradients are those of the loss times the loss scale.
        accumulation: the window.
        weight: scalar float32, the number of examples of the step.
        settle: called inside the branch of the update; makes it and takes up what
            became of it.
        loss: this replica's share of the loss, where it is known.
        watch: looks at the step, and at the update where there is one.

    Returns:
        What became of this step; its verdict is that on the batch.
    """
    dynamic = optimizers.is_dynamic(optimizer)
    scale = optimizers.loss_scale(optimizer)
    finite: Any = None
    if dynamic or hooks.may_skip_steps:
        # Looked at step by step: one bad batch costs itself, not the window.
        finite = replicas.all_true(gradients.all_finite())
    if scaled and scale is not None:
        gradients = gradients.scale(1.0 / tf.cast(scale, tf.float32))
    accumulation.add(gradients, weight, finite, loss)
    missing = [g is None for g in gradients.values()]
    variables = gradients.variables
    full = accumulation.is_full()
    closing = (accumulation, variables, missing, optimizer, hooks, settle)
    closing_watch = None
    if watch is not None:
        watch.given(replicas.all_reduce(gradients))
        closing_watch = watch.after_accumulation()
    replicas.when(full, lambda _: close(*closing, closing_watch), [])
    if dynamic:
        overflow = [tf.fill(tf.shape(g), float("nan")) for g in _dense(gradients)]
        indices = [i for i, gone in enumerate(missing) if not gone]
        replicas.when(~finite, _applying(optimizer, variables, indices), overflow)
    return Outcome(finite, [], None if watch is None else watch.seen(finite))


def close(
    accumulation: Accumulation,
    variables: Sequence[Any],
    missing: Sequence[bool],
    optimizer: Any,
    hooks: HookList,
    settle: Settle,
    watch: Watch | None = None,
) -> None:
    """Makes the update of a window, full or not, and begins a new one."""

    def make_update(_: Any) -> None:
        mean = accumulation.mean(variables, missing)
        parts = accumulation.as_part(mean) if hooks.uses_parts else None
        loss = accumulation.mean_loss()
        settle(lambda: update(mean, optimizer, hooks, False, loss, parts, watch))

    replicas.when(accumulation.is_started(), make_update, [])
    accumulation.clear()


def _dense(gradients: Gradients) -> list[tf.Tensor]:
    return [to_dense(g) for g in gradients.values() if g is not None]


def _parts(gradients: Gradients, parts: Any, scale: Any) -> Any:
    """Returns `square_norm`, `inverse` and `whole_inverse` of `Parts`.

    The parts are micro-batches, or else replicas; with neither it is `None`.
    """
    if parts is None:
        norms = tf.reshape(tf.cast(gradients.global_norm(), tf.float32), [1])
        weights = tf.ones(1)
        share: Any = 1.0
    else:
        norms, weights, share = parts
    if int(norms.shape[0]) * replicas.count() == 1:
        return None
    # Keras divides the loss of a replica by the number of replicas.
    factor = replicas.count() / (1.0 if scale is None else tf.cast(scale, tf.float32))
    total = tf.reduce_sum(weights)
    square_norm = tf.reduce_sum(weights * tf.square(factor * norms))
    count = tf.math.count_nonzero(weights, dtype=tf.float32)
    means = [share * square_norm, share * count, tf.square(share)]
    means = replicas.sum_over(tf.math.divide_no_nan(tf.stack(means), total)) / replicas.count()
    return means[0], means[1], means[2] / replicas.count()


def _verdict(step: Step) -> tf.Tensor | None:
    if not step.rejections:
        return None
    return ~tf.reduce_any(tf.stack(step.rejections))


def _and(a: tf.Tensor | None, b: tf.Tensor | None) -> tf.Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a & b


def _or_not(admitted: tf.Tensor | None, finite: tf.Tensor) -> tf.Tensor | None:
    return None if admitted is None else admitted | ~finite


def _apply(optimizer: Any, gradients: Gradients, admitted: tf.Tensor | None) -> None:
    present = [i for i, g in enumerate(gradients.values()) if g is not None]
    apply = _applying(optimizer, gradients.variables, present)
    values = [gradients.values()[i] for i in present]
    if admitted is None:
        apply(values)
    else:
        used = [*optimizer.variables, *gradients.variables]
        replicas.when(admitted, apply, values, replicas.on_one_cpu(used))


def _applying(
    optimizer: Any, variables: Sequence[Any], present: Sequence[int]
) -> Callable[[Sequence[Any]], None]:
    """Returns what updates `variables` with the gradients of those at `present`."""

    def apply(values: Sequence[Any]) -> None:
        padded: list[Any] = [None] * len(variables)
        for position, value in zip(present, values, strict=True):
            padded[position] = value
        overwriting = [
            (leaf, frequency, tf.identity(leaf.iterations.value))
            for leaf, frequency in optimizers.overwrites(optimizer)
        ]
        with optimizers.already_reduced(optimizer):
            optimizers.apply(optimizer, padded, variables)
        for leaf, frequency, before in overwriting:
            count = tf.convert_to_tensor(leaf.iterations.value)
            # A step that overflowed counts for nothing.
            due = (count != before) & (count % frequency == 0)
            replicas.when(due, functools.partial(optimizers.overwrite, leaf), [])

    return apply
