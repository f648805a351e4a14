"""The tape of a training step of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from keras_tapefit.gradients import Gradients
from keras_tapefit.training.runtime import Runtime
from keras_tapefit.training.scope import StepScope, open_scope
from keras_tapefit.update import loaded_optimizers, optimizers


class StepTape(tf.GradientTape):
    """A `tf.GradientTape` that knows its model's hooks and optimizer.

    Made by `model.gradient_tape()`.

    Args:
        runtime: the private side of the model.
        persistent: whether gradients may be taken several times.
    """

    def __init__(self, runtime: Runtime, persistent: bool = False) -> None:
        super().__init__(persistent=persistent)
        self._runtime = runtime
        self._scope: StepScope | None = None

    def __enter__(self) -> StepTape:
        # In a loop of one's own no step is open: it begins here.
        self._scope = open_scope(self._runtime)
        self._is_own = self._scope is None
        if self._scope is None:
            if self._runtime.model.built:
                self._runtime.prepare(getattr(self._runtime.model, "optimizer", None))
            self._scope = StepScope(self._runtime)
        self._scope.used_tape = True
        super().__enter__()
        return self

    # As Keras does with its own step: what runs in it is no code for AutoGraph.
    @tf.autograph.experimental.do_not_convert
    def minimize(
        self, loss: Any, variables: Sequence[Any] | None = None, optimizer: Any = None
    ) -> None:
        """Makes one update: scale, backward pass, replicas, hooks, gate, optimizer.

        To be called after the `with` block.

        Args:
            loss: the loss, a scalar tensor computed inside the `with` block, not
                multiplied by a loss scale.
            variables: the variables to update; by default the model's trainable ones.
            optimizer: a Keras optimizer; by default the one the model is compiled with.

        Raises:
            ValueError: when there is no optimizer or no variable.
        """
        model = self._runtime.model
        if optimizer is None:
            optimizer = getattr(model, "optimizer", None)
        if optimizer is None:
            raise ValueError(
                "`minimize` needs an optimizer. Compile the model with one, or pass `optimizer=`."
            )
        if self._scope is None:
            raise ValueError(
                "`minimize` needs a loss that was computed inside "
                "`with model.gradient_tape() as tape:`."
            )
        if variables is None:
            variables = model.trainable_variables
        else:
            variables = [v for v in variables if getattr(v, "trainable", True)]
        if not variables:
            raise ValueError("`minimize` got no variables to update.")
        prepare_optimizer(self._runtime, optimizer, variables)
        seed = optimizer.scale_loss(tf.ones_like(loss))
        self._scope.loss = loss
        gradients = self.gradient(loss, variables, output_gradients=seed)
        pairs = zip(gradients, variables, strict=True)
        self._scope.update(Gradients(pairs), optimizer, scaled=True)
        if self._is_own:
            self._scope.finish(None)


def prepare_optimizer(runtime: Runtime, optimizer: Any, variables: Sequence[Any]) -> None:
    """Builds an optimizer: the model's own for all it may ever update."""
    if optimizer is getattr(runtime.model, "optimizer", None):
        candidates = runtime.candidates()
        known = {id(v) for v in candidates}
        variables = candidates + [v for v in variables if id(v) not in known]
    if not optimizer.built:
        optimizers.build(optimizer, variables)
        loaded_optimizers.restore(optimizer)
