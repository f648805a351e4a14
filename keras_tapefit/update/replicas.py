"""Several replicas of one model: sums over them, and branches that they take together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from keras_tapefit.gradients import Gradients


def count() -> int:
    """Returns the number of replicas that this code runs on in step."""
    context = tf.distribute.get_replica_context()
    return 1 if context is None else context.num_replicas_in_sync


def in_strategy() -> bool:
    """Whether this code runs on a replica of a strategy; there may be only one."""
    return tf.distribute.has_strategy() and tf.distribute.in_cross_replica_context() is False


def all_reduce(gradients: Gradients) -> Gradients:
    """Sums gradients over replicas; `None` stays `None`, sparse stays sparse."""
    if count() == 1:
        return gradients
    context = tf.distribute.get_replica_context()
    present = gradients.present()
    summed = context.all_reduce(tf.distribute.ReduceOp.SUM, present) if present else []
    return gradients.with_present(summed)


def sum_over(value: Any) -> Any:
    """Sums a tensor over replicas."""
    if count() == 1:
        return value
    # What a branch reads from outside is on no device, which several workers must know.
    value = tf.nest.map_structure(tf.identity, value)
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, value)


def all_true(value: tf.Tensor) -> tf.Tensor:
    """Returns whether a scalar bool is true on every replica."""
    return sum_over(tf.cast(~value, tf.int32)) == 0


def when(
    predicate: tf.Tensor, fn: Callable[[Sequence[Any]], None], arguments: Sequence[Any]
) -> None:
    """Calls `fn(arguments)` where `predicate` is true, in a branch.

    Args:
        predicate: scalar bool, the same on every replica.
        fn: updates variables; it may synchronise replicas, as optimizers do.
        arguments: tensors or `tf.IndexedSlices`, those of this replica.
    """
    if not in_strategy():
        tf.cond(predicate, _and_zero(lambda: fn(arguments)), lambda: tf.constant(0))
        return

    def across(strategy: Any, predicates: Any, arguments: Any) -> None:
        # A branch inside one replica may not synchronise; one around all of them may.
        verdict = strategy.experimental_local_results(predicates)[0]
        run = _and_zero(lambda: strategy.run(fn, args=(arguments,)))
        tf.cond(verdict, run, lambda: tf.constant(0))

    tf.distribute.get_replica_context().merge_call(across, args=(predicate, list(arguments)))


def _and_zero(call: Callable[[], Any]) -> Callable[[], tf.Tensor]:
    """Returns what calls a function; a branch has to have a result."""

    def branch() -> tf.Tensor:
        call()
        return tf.constant(0)

    return branch
