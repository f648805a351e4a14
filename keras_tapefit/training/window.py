"""The end of an epoch in the middle of a window of accumulated gradients."""

from __future__ import annotations

import tensorflow as tf

from keras_tapefit.training.runtime import Runtime
from keras_tapefit.training.scope import StepScope
from keras_tapefit.update.update import close


def flush_window(runtime: Runtime) -> None:
    """Makes an update of the steps that are left over, with their true count."""
    window = runtime.window
    if window is None or runtime.evaluating or not window.missing:
        return
    model = runtime.model
    variables = model.trainable_variables
    if len(variables) != len(window.missing):
        # Something was frozen since the last step: what is left over is not for these.
        window.clear()
        return

    def step() -> None:
        scope = StepScope(runtime)
        close(window, variables, window.missing, model.optimizer, runtime.hooks, scope.settle)

    key = (tuple(map(id, variables)), runtime.hooks.structure(), id(window))
    if model.run_eagerly:
        model.distribute_strategy.run(step)
        return
    if key not in runtime.flushes:
        runtime.flushes[key] = tf.function(
            lambda: model.distribute_strategy.run(step), autograph=False
        )
    runtime.flushes[key]()
