"""The second half of a step: from gradients to weights."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from keras_tapefit.backward.base import Computed
from keras_tapefit.gradients import Gradients
from keras_tapefit.gradients.sparse import to_dense
from keras_tapefit.gradients.xla import is_in_xla
from keras_tapefit.hooks import HookList
from keras_tapefit.hooks.log_entries import LogEntries
from keras_tapefit.hooks.step import LogEntry, Parts, Step
from keras_tapefit.update import optimizers, replicas
from keras_tapefit.update.records import Records
from keras_tapefit.update.rollback import Rollback
from keras_tapefit.update.watch import Seen, Watch
from keras_tapefit.update.window import Window


@dataclass
class Outcome:
    """The outcome of a step, for the logs.

    Attributes:
        accepted: scalar bool, whether the step was applied; `None`: always.
        entries: what the hooks reported.
        seen: what a record of the step needs, where one is asked for.
    """

    accepted: tf.Tensor | None
    entries: list[LogEntry]
    seen: Seen | None = None


def may_reject(optimizer: Any, hooks: HookList) -> bool:
    """Whether a step with these hooks can be skipped as a whole."""
    return hooks.may_skip_steps or (len(hooks) > 0 and optimizers.is_dynamic(optimizer))


def make_update(
    gradients: Gradients,
    optimizer: Any,
    hooks: HookList,
    scaled: bool,
    loss: Any = None,
    norms: Any = None,
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
        norms: of the gradients of the parts of this replica's batch, times the loss
            scale where that is in `gradients`, and the numbers of their examples, both
            of shape `[num_parts]`; `None`: the batch of all replicas is one part.
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

    gradients = replicas.all_reduce(gradients)
    if hooks:
        gradients = gradients.with_unique_rows()
    dynamic = optimizers.is_dynamic(optimizer)
    finite = gradients.all_finite() if dynamic else None
    if scaled and scale is not None:
        gradients = gradients.scale(1.0 / tf.cast(scale, tf.float32))

    step = Step(index=optimizers.updates_made(optimizer))
    if hooks.uses_loss and loss is not None:
        step.loss = tf.cast(replicas.sum_over(loss), tf.float32)
    if hooks.uses_parts:
        step.parts = _parts(norms, scale if scaled else None, gradients)
    if watch is not None:
        watch.given(gradients)
    gradients = hooks.run(gradients, step)
    admitted = _verdict(step)
    if watch is not None:
        watch.made(gradients)
        watch.updating(variables)

    after_update = hooks.watch_update(variables, step)
    if is_in_xla():
        _apply_undoing(optimizer, gradients, admitted, finite)
    else:
        if dynamic:
            # A step that overflowed stays so whatever the hooks made of it: the optimizer
            # then skips it and halves the scale on its own.
            gradients = gradients.scale(tf.where(finite, scale, float("nan")))
        _apply(optimizer, gradients, admitted if not dynamic else _or_not(admitted, finite))
    if hooks.watches_update:
        with optimizers.averages_following(optimizer, variables):
            after_update()
    accepted = _and(admitted, finite if hooks else None)
    if watch is None:
        return Outcome(accepted, step.entries)
    watch.updated(variables)
    return Outcome(accepted, step.entries, watch.seen(_and(admitted, finite)))


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
    computed: Computed,
    call: int,
    steps: tf.Tensor,
    optimizer: Any,
    hooks: HookList,
    scaled: bool,
    window: Window,
    entries: LogEntries,
    records: Records | None,
    watch: Watch | None = None,
) -> Outcome:
    """Adds the gradients of a step to the window, and makes the update where it is full.

    Args:
        computed: what is known of the batch, of this replica.
        call: the number of the call of the optimizer in this step, from 0.
        steps: the number of steps in the window before this one.
        optimizer: a built Keras optimizer.
        hooks: built hooks; they receive the mean of the window.
        scaled: whether the gradients are those of the loss times the loss scale.
        window: the window.
        entries: where hooks' log entries go in the step that makes the update.
        records: where the record of the update goes; `None`: nowhere.
        watch: looks at the step.

    Returns:
        What became of this step; its verdict is that on the batch.
    """
    if hooks.uses_loss and any(q.loss is None for q in computed.quotients):
        raise ValueError(
            "A hook looks at the loss, and `apply_gradients` was called with gradients "
            "alone, which accumulate. Use `tape.minimize(loss)`."
        )
    gradients = computed.gradients
    dynamic = optimizers.is_dynamic(optimizer)
    scale = optimizers.loss_scale(optimizer)
    finite: Any = None
    if dynamic or hooks.may_skip_steps:
        # Looked at step by step: one bad batch costs itself, not the window.
        finite = replicas.all_true(gradients.all_finite())
    quotients = computed.quotients
    if scaled and scale is not None:
        factor = 1.0 / tf.cast(scale, tf.float32)
        gradients = gradients.scale(factor)
        quotients = [q.scaled_by(factor) for q in quotients]
    full = window.add(call, quotients, finite, computed.examples, computed.all_examples, steps)
    if finite is not None:
        full &= finite
    if watch is not None:
        watch.given(replicas.all_reduce(gradients))

    def close_window(_: Any) -> None:
        close(window, call, True, gradients.variables, optimizer, hooks, entries, records)

    replicas.when(full, close_window, [])
    if dynamic:
        overflow = [tf.fill(tf.shape(g), float("nan")) for g in _dense(gradients)]
        apply = _applying(optimizer, gradients)

        def halve_scale(values: Sequence[Any]) -> None:
            with window.set_aside():
                apply(values)

        replicas.when(~finite, halve_scale, overflow)
    return Outcome(finite, [], None if watch is None else watch.seen(finite))


def close(
    window: Window,
    call: int,
    full: bool,
    variables: Sequence[Any],
    optimizer: Any,
    hooks: HookList,
    entries: LogEntries,
    records: Records | None,
) -> None:
    """Makes the update of a window, full or not, and begins a new one.

    Args:
        window: the window.
        call: the number of the call of the optimizer in a step, from 0.
        full: whether the window is; not at the end of an epoch, with steps left over.
        variables: those being trained now.
        optimizer, hooks, entries, records: as in `accumulate`.
    """
    with window.counting_updates(call == 0, full):
        mean, loss = window.mean(call, variables)
        rollback = Rollback(hooks.undone_variables()) if may_reject(optimizer, hooks) else None
        norms = window.norms(call, mean) if hooks.uses_parts else None
        watch = None if records is None else Watch(records.request)
        outcome = make_update(mean, optimizer, hooks, False, loss, norms, watch)
        if rollback is not None and outcome.accepted is not None:
            rollback.restore_unless(outcome.accepted)
        if records is not None and outcome.seen is not None:
            records.close_window(variables, outcome.seen)
        log(entries, outcome.entries, outcome.accepted, rollback is not None)
    window.clear(call)


def log(
    epoch: LogEntries,
    entries: Sequence[LogEntry],
    accepted: tf.Tensor | None,
    rejects: bool,
    taken: Collection[str] = (),
) -> None:
    """Adds the log entries of one step to the epoch's means.

    Args:
        epoch: the epoch's.
        entries: what the hooks report.
        accepted: scalar bool; `None`: the step is accepted.
        rejects: whether steps can be rejected, and are counted.
        taken: the names of the model's own log entries.
    """
    entries = list(entries)
    if rejects:
        skipped = tf.constant(0.0) if accepted is None else tf.cast(~accepted, tf.float32)
        entries.append(LogEntry(None, "skipped_steps", skipped, "sum"))
    if entries:
        epoch.add(entries, accepted, taken)


def _dense(gradients: Gradients) -> list[tf.Tensor]:
    return [to_dense(g) for g in gradients.present()]


def _parts(norms: Any, scale: Any, whole: Gradients) -> Parts | None:
    """Returns how large the gradients of the parts of the batch are, on all replicas.

    The parts are micro-batches, or else replicas; with neither it is `None`.
    """
    if norms is None:
        return None
    values, sizes = norms
    if scale is not None:
        values /= tf.cast(scale, tf.float32)
    sums = tf.stack(
        [
            tf.reduce_sum(tf.math.multiply_no_nan(tf.square(values), sizes)),
            tf.math.count_nonzero(sizes, dtype=tf.float32),
            tf.reduce_sum(sizes),
        ]
    )
    squares, count, total = tf.unstack(replicas.sum_over(sums))
    whole_norm = tf.cast(whole.global_norm(), tf.float32)
    divide = tf.math.divide_no_nan
    return Parts(
        divide(squares, total), divide(count, total), tf.square(whole_norm), divide(1.0, total)
    )


def _verdict(step: Step) -> tf.Tensor | None:
    if not step.rejections:
        return None
    return ~functools.reduce(operator.or_, step.rejections)


def _and(a: tf.Tensor | None, b: tf.Tensor | None) -> tf.Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a & b


def _or_not(admitted: tf.Tensor | None, finite: tf.Tensor) -> tf.Tensor | None:
    return None if admitted is None else admitted | ~finite


def _apply(optimizer: Any, gradients: Gradients, admitted: tf.Tensor | None) -> None:
    apply = _applying(optimizer, gradients)
    if admitted is None:
        apply(gradients.present())
    else:
        # Joined: a branch takes what it reads one by one.
        joined = gradients._joined()

        def update(pieces: Sequence[Any]) -> None:
            apply(joined.with_pieces(pieces).divided())

        replicas.when(admitted, update, joined.pieces)


def _apply_undoing(
    optimizer: Any, gradients: Gradients, admitted: tf.Tensor | None, finite: tf.Tensor | None
) -> None:
    """Does what `_apply` does without a branch: the update is made, and undone."""
    inner = optimizer if finite is None else optimizer.inner_optimizer
    applied = gradients if finite is None else gradients.where(finite)
    accepted = _and(admitted, finite)
    rollback = None
    if accepted is not None:
        # In a window the updates are counted by another variable than the optimizer's own.
        counts = [leaf.iterations for leaf in optimizers.leaves(inner)]
        held = {id(v): v for v in [*inner.variables, *counts, *gradients.variables]}
        rollback = Rollback(list(held.values()))
    _applying(inner, applied)(applied.present())
    if rollback is not None and accepted is not None:
        rollback.restore_unless(accepted)
    if finite is not None:
        optimizers.adapt_scale(optimizer, finite, admitted)


def _applying(optimizer: Any, gradients: Gradients) -> Callable[[Sequence[Any]], None]:
    """Returns what updates the variables with other values of gradients that are present."""

    def apply(values: Sequence[Any]) -> None:
        given = gradients.with_present(values)
        overwriting = [
            (leaf, frequency, tf.identity(leaf.iterations.value))
            for leaf, frequency in optimizers.overwrites(optimizer)
        ]
        with optimizers.already_reduced(optimizer):
            optimizers.apply(optimizer, given.values(), given.variables)
        for leaf, frequency, before in overwriting:
            count = tf.convert_to_tensor(leaf.iterations.value)
            # A step that overflowed counts for nothing.
            due = (count != before) & (count % frequency == 0)
            replicas.when(due, functools.partial(optimizers.overwrite, leaf), [])

    return apply
