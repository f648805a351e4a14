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


def all_reduce(gradients: Gradients) -> Gradients:
    """Sums gradients over replicas; `None` stays `None`, sparse stays sparse."""
    if count() == 1:
        return gradients
    context = tf.distribute.get_replica_context()
    present = [g for g in gradients.values() if g is not None]
    summed = iter(context.all_reduce(tf.distribute.ReduceOp.SUM, present) if present else ())
    return Gradients([(None if g is None else next(summed), v) for g, v in gradients.pairs()])


def sum_over(value: Any) -> Any:
    """Sums a tensor over replicas."""
    if count() == 1:
        return value
    # What a branch reads from outside is on no device, which several workers must know.
    value = tf.nest.map_structure(tf.identity, value)
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, value)


def relative_share(weight: tf.Tensor) -> tf.Tensor:
    """Returns by how much more than the others a replica counts, given its weight.

    Exactly 1 where all have the same.
    """
    return tf.math.divide_no_nan(count() * weight, sum_over(weight))


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

    def branch(call: Callable[[], Any]) -> None:
        def taken() -> tf.Tensor:
            call()
            return tf.constant(0)

        tf.cond(predicate, taken, lambda: tf.constant(0))

    if count() == 1:
        branch(lambda: fn(arguments))
        return

    def across(strategy: Any, predicates: Any, arguments: Any) -> None:
        # A branch inside one replica may not synchronise; one around all of them may.
        verdict = strategy.experimental_local_results(predicates)[0]

        def taken() -> tf.Tensor:
            strategy.run(fn, args=(arguments,))
            return tf.constant(0)

        tf.cond(verdict, taken, lambda: tf.constant(0))

    tf.distribute.get_replica_context().merge_call(across, args=(predicate, list(arguments)))
