"""Additions to Keras's trainer under a `tf.distribute` strategy.

Several steps in one execution crash in Keras under strategies of several replicas, and
`MultiWorkerMirroredStrategy` cannot run `fit` at all (keras#20585).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_tapefit.training import keras_trainer
from keras_tapefit.update import optimizers


def has_workers(model: Any) -> bool:
    """Whether the model is trained by several processes together."""
    strategy = keras_trainer.strategy_of(model)
    kind = tf.distribute.MultiWorkerMirroredStrategy
    return isinstance(strategy, kind)


def check_scope(model: Any, with_model: bool = True) -> None:
    """Refuses a model or an optimizer that was not made in the scope it is trained in.

    A model that has no variables yet belongs to that strategy from now on.

    Args:
        model: the model.
        with_model: whether to look at its own variables too.

    Raises:
        ValueError: where a variable was made outside the scope.
    """
    strategy = model.distribute_strategy
    optimizer = getattr(model, "optimizer", None)
    found = [("optimizer", leaf.variables[0]) for leaf in optimizers.leaves(optimizer)]
    if with_model:
        found = [*(("model", v) for v in model.variables), *found]
    for what, variable in found:
        if strategy.extended.variable_created_in_scope(variable.value):
            continue
        raise ValueError(
            f"The {what} was not made in the scope of the strategy that it is trained "
            f"with, {type(strategy).__name__}: its variable {variable.path!r} was made "
            "outside. Make the model inside `with strategy.scope():`, the optimizer too, "
            "or pass the optimizer by name; `fit` may be called outside."
        )
    if with_model:
        keras_trainer.keep_strategy(model)


class SameBeginning(keras.callbacks.Callback):
    """Stops all workers where they would not begin at the same epoch and step.

    One that was killed before it wrote the backup of an epoch is behind the others.
    """

    def on_train_begin(self, logs: Any = None) -> None:
        strategy = self.model.distribute_strategy
        optimizer = self.model.optimizer
        is_built = optimizer is not None and optimizer.built
        steps = int(optimizer.iterations.numpy()) if is_built else 0
        mine = [keras_trainer.resumed_epoch(self.model), steps]

        def gather() -> tf.Tensor:
            context = tf.distribute.get_replica_context()
            return context.all_gather(tf.constant([mine], tf.int64), axis=0)

        gathered = strategy.run(tf.function(gather, autograph=False))
        begins = sorted(set(map(tuple, strategy.experimental_local_results(gathered)[0].numpy())))
        if len(begins) > 1:
            shown = " or ".join(f"epoch {epoch} with {steps} updates" for epoch, steps in begins)
            raise RuntimeError(
                f"The workers would begin at different places: {shown}. One was probably "
                "killed before it had written its backup. Give all workers the same one "
                "(copy one worker's backup folder to the others), or delete all backups."
            )


def check_storage(model: Any, keeps_state: bool) -> None:
    """Refuses state that a step changes where all replicas share one copy of it.

    Raises:
        ValueError: under a `CentralStorageStrategy` of several replicas.
    """
    strategy = model.distribute_strategy
    central = tf.distribute.experimental.CentralStorageStrategy
    if keeps_state and isinstance(strategy, central) and strategy.num_replicas_in_sync > 1:
        raise ValueError(
            "Gradient hooks, gradient accumulation and records of steps do not work with "
            "several replicas under a CentralStorageStrategy, which cannot change their state "
            "in a step. Use `tf.distribute.MirroredStrategy`, or one device."
        )


def needs_own_function(model: Any) -> bool:
    """Whether Keras's own function for an execution fails for this model."""
    return has_workers(model) or (_has_replicas(model) and model.steps_per_execution > 1)


def needs_own_build(model: Any) -> bool:
    """Whether Keras averages batches of replicas to learn their shapes.

    It fails where their shares are not alike, and where they are on several machines.
    """
    return has_workers(model) or _has_replicas(model)


def _has_replicas(model: Any) -> bool:
    strategy = keras_trainer.strategy_of(model)
    return strategy is not None and strategy.num_replicas_in_sync > 1


def make_function(model: Any, step: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Returns a function of an iterator that runs `step` as often as compiled.

    Args:
        model: the model.
        step: takes a batch and returns logs.
    """
    if has_workers(model):
        step = _with_log_axis(step)
    if not needs_own_function(model) or model.steps_per_execution == 1:
        return keras_trainer.StepFunction(model, step)
    return _unrolled(model, step)


def _with_log_axis(step: Callable[[Any], Any]) -> Callable[[Any], Any]:
    # Keras averages the logs of workers over their first axis, which scalars lack.
    def with_axis(data: Any) -> Any:
        return keras.tree.map_structure(lambda v: tf.reshape(v, [-1]), step(data))

    return with_axis


def _unrolled(model: Any, step: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several steps one after the other, on batches fetched outside the graph."""

    def steps(batches: tuple[Any, ...]) -> Any:
        logs: Any = None
        for batch in batches:
            logs = model.distribute_strategy.run(step, args=(batch,))
        return keras_trainer.reduced_logs(model, logs)

    if model.run_eagerly:
        return lambda iterator: steps(tuple(_fetched(iterator, model)))
    traced = tf.function(steps, reduce_retracing=True, autograph=False)
    known: set[int] = set()

    def function(iterator: Any) -> Any:
        fetched = _fetched(iterator, model)
        batches, spec = tuple(fetched), fetched.element_spec
        if spec is not None and len(batches) not in known:
            known.add(len(batches))
            traced.get_concrete_function((spec,) * len(batches))
        return traced(batches)

    return function


def _fetched(iterator: Any, model: Any) -> keras_trainer.Fetched:
    kind = keras_trainer.Fetched
    return iterator if isinstance(iterator, kind) else kind(iterator, model.steps_per_execution)


def local_batch(iterator: Any, model: Any) -> Any:
    """Returns this worker's share of the next batch."""

    def local(value: Any) -> Any:
        if isinstance(value, tf.distribute.DistributedValues):
            return model.distribute_strategy.experimental_local_results(value)[0]
        return value

    # Keras 3.10 gives the step, later ones where an execution begins and ends.
    for *_, batches in iterator:
        return keras.tree.map_structure(local, next(batches))
    return None
