"""Hooks and optimizer as one XLA program: `compile(jit_compile="update")`."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from keras_tapefit.gradients import Gradients
from keras_tapefit.gradients.xla import in_xla
from keras_tapefit.hooks import HookList
from keras_tapefit.hooks.step import LogEntry
from keras_tapefit.update.making import Outcome, make_update
from keras_tapefit.update.watch import Watch


def make_update_compiled(
    gradients: Gradients,
    optimizer: Any,
    hooks: HookList,
    scaled: bool,
    loss: Any = None,
    norms: Any = None,
    watch: Watch | None = None,
) -> Outcome:
    """Does what `make_update` does, compiled by XLA.

    An optimizer makes many passes over the weights, hooks some more; XLA makes few of
    them. Forward and backward pass stay as they are. In eager mode and under strategies
    it is `make_update`.

    Args:
        gradients, optimizer, hooks, scaled, loss, norms, watch: see `make_update`.
    """
    if tf.executing_eagerly() or tf.distribute.has_strategy():
        return make_update(gradients, optimizer, hooks, scaled, loss, norms, watch)
    made: list[Outcome] = []

    def body(values: Any, loss: Any, norms: Any) -> Any:
        given = gradients.with_present(values)
        with in_xla():
            outcome = make_update(given, optimizer, hooks, scaled, loss, norms, watch)
        made.append(outcome)
        reported = [(r.value, tf.cast(r.weight, tf.float32)) for r in outcome.entries]
        return outcome.accepted, reported, outcome.seen

    compiled = tf.function(body, jit_compile=True, autograph=False)
    accepted, values, seen = compiled(gradients.present(), loss, norms)
    # Its tensors belong to the program; what comes out of it takes their place.
    entries = [
        LogEntry(entry.hook, entry.name, value, entry.reduction, weight)
        for entry, (value, weight) in zip(made[-1].entries, values, strict=True)
    ]
    return Outcome(accepted, entries, seen)
