"""Access to the private side of Keras optimizers.

Private names used here: `BaseOptimizer._all_reduce_sum_gradients`,
`_trainable_variables`, `_model_variables_moving_average`, and
`OptimizerMap._optimizer_map` through `MultiOptimizer._optimizer_map`. Checked with Keras
3.15.1; `tests/update/test_private_names.py` fails when they change.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_tapefit.gradients import variable_path
from keras_tapefit.update import fast_trace

LossScaleOptimizer = keras.optimizers.LossScaleOptimizer
MultiOptimizer: Any = getattr(keras.optimizers, "MultiOptimizer", ())


def leaves(optimizer: Any) -> Iterator[Any]:
    """Yields the optimizers that update weights, wrappers opened."""
    if optimizer is None:
        return
    if isinstance(optimizer, LossScaleOptimizer):
        yield from leaves(optimizer.inner_optimizer)
    elif isinstance(optimizer, MultiOptimizer):
        for inner in optimizer.optimizers:
            yield from leaves(inner)
    else:
        yield optimizer


def multi_optimizer(optimizer: Any) -> Any:
    """Returns the `MultiOptimizer` that `optimizer` is or wraps, or `None`."""
    if isinstance(optimizer, LossScaleOptimizer):
        return multi_optimizer(optimizer.inner_optimizer)
    return optimizer if isinstance(optimizer, MultiOptimizer) else None


def build(optimizer: Any, variables: Sequence[Any]) -> None:
    """Builds an optimizer that is not built yet, as its first `apply` would.

    Args:
        optimizer: any Keras optimizer.
        variables: every variable it may ever be asked to update.
    """
    if optimizer is None or optimizer.built or not variables:
        return
    with keras.name_scope(optimizer.name, caller=optimizer):
        optimizer.build(list(variables))
    optimizer.built = True
    multi = multi_optimizer(optimizer)
    patterns = getattr(getattr(multi, "_optimizer_map", None), "keys", lambda: ())()
    paths = [variable_path(v) for v in variables]
    for pattern in patterns:
        if not any(path == pattern or re.fullmatch(pattern, path) for path in paths):
            warnings.warn(
                f"The pattern {pattern!r} of the MultiOptimizer matches no variable, so "
                "its optimizer updates nothing and the default one takes its share. The "
                f"variables are: {paths}.",
                stacklevel=2,
            )


def loss_scale(optimizer: Any) -> Any:
    """Returns the factor that `optimizer.scale_loss` applies, or `None`.

    Must be read before replicas meet: afterwards one of them may be inside
    `already_reduced`, which puts it aside.
    """
    if isinstance(optimizer, LossScaleOptimizer):
        scale = optimizer.dynamic_scale if optimizer.built else optimizer.initial_scale
        return tf.convert_to_tensor(scale)
    return getattr(optimizer, "loss_scale_factor", None)


def updates_made(optimizer: Any) -> tf.Tensor:
    """Returns the number of updates so far, a scalar int64; 0 without an optimizer."""
    return tf.cast(0 if optimizer is None else optimizer.iterations, tf.int64)


def learning_rate(optimizer: Any) -> tf.Tensor:
    """Returns the learning rate of this step, a scalar float32; of several the first."""
    rate = next(leaves(optimizer)).learning_rate
    return tf.cast(tf.convert_to_tensor(rate), tf.float32)


def is_dynamic(optimizer: Any) -> bool:
    """Whether the optimizer skips steps and adapts its loss scale."""
    return isinstance(optimizer, LossScaleOptimizer)


def adapt_scale(optimizer: Any, finite: tf.Tensor, admitted: tf.Tensor | None) -> None:
    """Does what a `LossScaleOptimizer` does besides the update, without a branch.

    Args:
        optimizer: the `LossScaleOptimizer`.
        finite: scalar bool, whether the gradients are.
        admitted: scalar bool; where a gate rejects a finite step nothing changes.
            `None`: none does.
    """
    counter, scale = optimizer.step_counter, optimizer.dynamic_scale
    counts = tf.convert_to_tensor(counter.value)
    grows = finite & (counts == tf.cast(optimizer.dynamic_growth_steps - 1, counts.dtype))
    factor = tf.where(finite, tf.where(grows, 2.0, 1.0), 0.5)
    new_counts = tf.where(finite & ~grows, counts + 1, tf.zeros_like(counts))
    if admitted is not None:
        stays = finite & ~admitted
        factor = tf.where(stays, 1.0, factor)
        new_counts = tf.where(stays, counts, new_counts)
    counter.assign(new_counts)
    scale.assign(scale.value * tf.cast(factor, scale.dtype))


def has_loss_scale(optimizer: Any) -> bool:
    """Whether the optimizer divides gradients by what it multiplies the loss by."""
    return is_dynamic(optimizer) or getattr(optimizer, "loss_scale_factor", None) is not None


@contextlib.contextmanager
def already_reduced(optimizer: Any) -> Iterator[None]:
    """Has `optimizer.apply` take gradients as summed over replicas and unscaled.

    It leaves out `ema_overwrite_frequency`, whose branch Keras takes inside one replica;
    see `overwrites`.
    """
    entered = list(leaves(optimizer))
    for leaf in entered:
        # Past Keras's attribute tracking. Counted and not thread-local: the threads of
        # replicas interleave, and a LossScaleOptimizer starts new ones.
        state = leaf.__dict__
        if state.setdefault("_tapefit_depth", 0) == 0:
            state["_tapefit_factor"] = leaf.loss_scale_factor
            leaf.loss_scale_factor = None
            state["_tapefit_overwrite"] = leaf.ema_overwrite_frequency
            leaf.ema_overwrite_frequency = None
            state["_all_reduce_sum_gradients"] = list
        state["_tapefit_depth"] += 1
    try:
        yield
    finally:
        for leaf in entered:
            state = leaf.__dict__
            state["_tapefit_depth"] -= 1
            if state["_tapefit_depth"] == 0:
                leaf.loss_scale_factor = state.pop("_tapefit_factor")
                leaf.ema_overwrite_frequency = state.pop("_tapefit_overwrite")
                del state["_all_reduce_sum_gradients"], state["_tapefit_depth"]


def overwrites(optimizer: Any) -> list[tuple[Any, int]]:
    """Returns the optimizers that overwrite weights with averages, and how often."""
    frequencies = [
        # Another replica may be inside `already_reduced`.
        (leaf, leaf.__dict__.get("_tapefit_overwrite", leaf.ema_overwrite_frequency))
        for leaf in leaves(optimizer)
        if leaf.use_ema and leaf.built
    ]
    return [(leaf, frequency) for leaf, frequency in frequencies if frequency]


def overwrite(leaf: Any, _: Any = None) -> None:
    """Overwrites weights with the averages of one optimizer."""
    pairs = zip(leaf._trainable_variables, leaf._model_variables_moving_average, strict=True)
    for variable, average in pairs:
        if average is not None:
            variable.assign(average)


@contextlib.contextmanager
def silent(optimizers: Sequence[Any]) -> Iterator[None]:
    """Has `apply` of optimizers do nothing, those whose variables are all frozen."""
    for optimizer in optimizers:
        optimizer.__dict__["apply"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        for optimizer in optimizers:
            optimizer.__dict__.pop("apply", None)


def apply(optimizer: Any, gradients: Sequence[Any], variables: Sequence[Any]) -> None:
    """Calls `optimizer.apply` for the variables being trained.

    A `MultiOptimizer` wants all the variables it was built with: the frozen ones get
    `None`, and an inner optimizer that has only frozen ones is left out. A bare variable
    that the loss does not depend on is no mistake: it is left out too.
    """
    pairs = [
        (g, v)
        for g, v in zip(gradients, variables, strict=True)
        if g is not None or not getattr(v, "is_bare", False)
    ]
    gradients, variables = [g for g, _ in pairs], [v for _, v in pairs]
    multi = multi_optimizer(optimizer)
    if multi is None or not multi.built or len(variables) == len(multi._trainable_variables):
        with fast_trace.traced_once(list(leaves(optimizer))):
            optimizer.apply(list(gradients), list(variables))
        return
    by_id = {id(_value(v)): g for g, v in zip(gradients, variables, strict=True)}
    everything = list(multi._trainable_variables)
    padded = [by_id.get(id(_value(v))) for v in everything]
    idle = [
        inner
        for inner in multi.optimizers
        if inner.built and not any(id(_value(v)) in by_id for v in inner._trainable_variables)
    ]
    traced_once = fast_trace.traced_once(list(leaves(multi)))
    with silent(idle), traced_once, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Gradients do not exist")
        optimizer.apply(padded, everything)


def all_variables(leaf: Any) -> list[Any]:
    """Returns the variables that an optimizer was built for, in its order."""
    kept = leaf.__dict__.get("_tapefit_all")
    return leaf._trainable_variables if kept is None else [variable for variable, _ in kept]


def average_only(optimizer: Any, active: Sequence[Any]) -> None:
    """Keeps moving averages (`use_ema`) to the variables being trained.

    Keras walks weights and averages side by side from the start, so with early layers
    frozen it would hand one layer the average of another.

    Args:
        optimizer: a built optimizer.
        active: the variables being trained.
    """
    members = {id(_value(v)) for v in active}
    for leaf in leaves(optimizer):
        if not (leaf.use_ema and leaf.built):
            continue
        state = leaf.__dict__
        if "_tapefit_all" not in state:
            pairs = zip(
                leaf._trainable_variables, leaf._model_variables_moving_average, strict=True
            )
            state["_tapefit_all"] = list(pairs)
        kept = [pair for pair in state["_tapefit_all"] if id(_value(pair[0])) in members]
        state["_trainable_variables"] = [variable for variable, _ in kept]
        state["_model_variables_moving_average"] = [average for _, average in kept]


@contextlib.contextmanager
def averages_following(optimizer: Any, variables: Sequence[Any]) -> Iterator[None]:
    """Has moving averages (`use_ema`) see what happens to weights inside.

    Keras takes the average inside `apply`; what changes the weights after that would be
    missing from it.

    Args:
        optimizer: a built optimizer that has just been applied.
        variables: those that were updated.
    """
    members = {id(_value(v)) for v in variables}
    followed = [
        (leaf, variable, average, tf.identity(_value(variable)))
        for leaf in leaves(optimizer)
        if leaf.use_ema and leaf.built
        for variable, average in zip(
            leaf._trainable_variables, leaf._model_variables_moving_average, strict=True
        )
        if average is not None and id(_value(variable)) in members
    ]
    yield
    for leaf, variable, average, before in followed:
        # Keras starts the average with the weights of the first update.
        momentum = tf.where(leaf.iterations > 1, leaf.ema_momentum, 0.0)
        change = tf.convert_to_tensor(_value(variable)) - before
        average.assign(average.value + tf.cast(1.0 - momentum, change.dtype) * change)


def _value(variable: Any) -> Any:
    return variable.value if isinstance(variable, keras.Variable) else variable
