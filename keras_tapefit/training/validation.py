"""The gradients of validation batches, for hooks that look at them."""

from __future__ import annotations

import tensorflow as tf

from keras_tapefit.backward.base import Batch, Forward
from keras_tapefit.gradients import Gradients
from keras_tapefit.hooks.step import Step
from keras_tapefit.training.objective import ModelObjective
from keras_tapefit.training.runtime import Runtime
from keras_tapefit.update import optimizers, replicas


def watch(
    runtime: Runtime, objective: ModelObjective, batch: Batch, forward: Forward
) -> dict[str, tf.Tensor]:
    """Shows the gradients of a batch to the hooks that ask for them.

    Args:
        runtime: the private side of the model.
        objective: the loss of the model.
        batch: of `evaluate`.
        forward: its forward pass.

    Returns:
        What the hooks report, means over the batches so far; without such hooks nothing,
        and nothing is computed.
    """
    model = runtime.model
    variables = model.trainable_variables
    if not runtime.hooks.watches_validation or not variables:
        return {}
    runtime.prepare_hooks()
    _, [found] = objective.gradients_at(batch, like=forward)
    gradients = Gradients(zip(found, variables, strict=True))
    if forward.counts is not None:
        gradients = gradients.where(forward.counts)
    gradients = replicas.all_reduce(gradients).with_unique_rows()
    scale = optimizers.loss_scale(model.optimizer)
    if scale is not None:
        gradients = gradients.scale(1.0 / tf.cast(scale, tf.float32))
    step = Step(index=objective.steps())
    runtime.hooks.validate(gradients, step)
    runtime.logs.entries.add(step.entries, None, validation=True)
    return runtime.logs.entries.results([entry.name for entry in step.entries])
