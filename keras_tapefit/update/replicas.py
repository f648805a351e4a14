"""Several replicas of one model: sums over them, and branches that they take together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
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
    predicate: tf.Tensor,
    fn: Callable[[Sequence[Any]], None],
    arguments: Sequence[Any],
    of_one_cpu: bool = False,
) -> None:
    """Calls `fn(arguments)` where `predicate` is true, in a branch.

    Args:
        predicate: scalar bool, the same on every replica.
        fn: updates variables; it may synchronise replicas, as optimizers do.
        arguments: tensors or `tf.IndexedSlices`, those of this replica.
        of_one_cpu: whether all variables that `fn` uses are on one CPU. The branch can
            then be a function, which TensorFlow makes ready in far less time than a
            branch that is taken apart.
    """
    if not in_strategy():
        if of_one_cpu and not tf.executing_eagerly():
            _call_when(predicate, lambda: fn(arguments))
        else:
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


def _call_when(predicate: tf.Tensor, call: Callable[[], Any]) -> None:
    """Does what `tf.cond` does; each branch stays a function."""
    taken = tf.function(_and_zero(call), autograph=False).get_concrete_function()
    inputs = taken.captured_inputs
    specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in inputs]
    idle = tf.function(lambda *given: tf.constant(0), autograph=False)
    tf.raw_ops.If(
        cond=predicate,
        input=inputs,
        Tout=[tf.int32],
        then_branch=taken,
        else_branch=idle.get_concrete_function(*specs),
    )


def on_one_cpu(variables: Sequence[Any]) -> bool:
    """Returns whether variables are on one device, a CPU, and no other kind is there."""
    kinds = {device.device_type for device in tf.config.list_logical_devices()}
    if tf.distribute.has_strategy() or kinds != {"CPU"}:
        return False
    values = [v.value if isinstance(v, keras.Variable) else v for v in variables]
    return len({value.device for value in values}) == 1
