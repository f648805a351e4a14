"""The loss of a model, as the ways to get gradients see it."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from keras_tapefit.models import keras_trainer
from keras_tapefit.models.runtime import runtime_of
from keras_tapefit.models.scope import note_loss, note_parts


class ModelObjective:
    """See `keras_tapefit.backward.base.Objective`.

    Args:
        model: the model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._runtime = runtime_of(model)
        self.noted: Any = None

    @property
    def wants_parts(self) -> bool:
        return self._runtime.hooks.uses_parts

    def tape(self) -> tf.GradientTape:
        model = self._model
        variables = model.trainable_variables
        if not model.built or len(variables) == len(self._runtime.candidates()):
            return tf.GradientTape()
        return _TapeOf(variables)

    def loss(self, batch: tuple[Any, Any, Any]) -> tuple[tf.Tensor, Any]:
        model = self._model
        y_pred = keras_trainer.forward(model, batch[0], training=True)
        loss = keras_trainer.compute_loss(model, batch, y_pred, training=True)
        self.note(loss)
        if model.optimizer is not None:
            loss = model.optimizer.scale_loss(loss)
        return loss, y_pred

    def variables(self) -> list[Any]:
        return self._model.trainable_variables

    def batch_size(self, batch: tuple[Any, Any, Any]) -> Any:
        return keras_trainer.static_batch_size(batch[0])

    def weight(self, batch: tuple[Any, Any, Any], outputs: Any) -> tf.Tensor:
        return keras_trainer.loss_weight(self._model, batch, outputs)

    def masks(self, outputs: Any) -> list[Any]:
        return keras_trainer.masks_of(outputs)

    def set_masks(self, outputs: Any, masks: list[Any]) -> None:
        keras_trainer.set_masks(outputs, masks)

    def note(self, loss: Any) -> None:
        self.noted = loss
        note_loss(self._runtime, loss)

    def note_parts(self, norms: tf.Tensor, weights: tf.Tensor) -> None:
        note_parts(self._runtime, norms, weights)


class _TapeOf(tf.GradientTape):
    """A tape with nothing but some variables in it: what leads to others only is not
    even recorded."""

    def __init__(self, variables: list[Any]) -> None:
        super().__init__(watch_accessed_variables=False)
        self._tapefit_variables = variables

    def __enter__(self) -> _TapeOf:
        super().__enter__()
        for variable in self._tapefit_variables:
            self.watch(variable.value)
        return self
