"""The loss of a model, as the ways to get gradients see it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_tapefit.backward.base import Batch
from keras_tapefit.gradients import layers_of
from keras_tapefit.training import keras_trainer
from keras_tapefit.training.bare_variables import AdoptedVariable
from keras_tapefit.training.runtime import runtime_of
from keras_tapefit.training.scope import note_loss, note_parts
from keras_tapefit.update import optimizers, replicas, trainable


class ModelObjective:
    """See `keras_tapefit.backward.base.Objective`.

    Args:
        model: the model.
        training: whether layers run as in training.
    """

    def __init__(self, model: Any, training: bool = True) -> None:
        self._model = model
        self._training = training
        self._runtime = runtime_of(model)
        self.noted: Any = None

    @property
    def wants_parts(self) -> bool:
        return self._runtime.hooks.uses_parts

    def tape(self, persistent: bool = False) -> tf.GradientTape:
        model = self._model
        variables = model.trainable_variables
        if not model.built or len(variables) == len(self._runtime.candidates()):
            return tf.GradientTape(persistent=persistent)
        return _TapeOf([v.value for v in variables], persistent)

    def loss(self, batch: Batch) -> tuple[tf.Tensor, Any]:
        loss, y_pred = self._loss(batch)
        self.note(loss)
        return self._scaled(loss), y_pred

    def losses(self, batch: Batch, tasks: Any = None) -> tuple[list[Any], Any, Any]:
        model = self._model
        if tasks is None:
            keras_trainer.build_losses(model, batch)
        y_pred = keras_trainer.forward(model, batch[0], training=True)
        if tasks is None:
            total, terms = keras_trainer.separate_losses(model, batch, y_pred)
            rest = None
            if model.losses or keras_trainer.overrides_compute_loss(model):
                # Of the terms nothing is left but this: their slopes cancel exactly.
                rest = total - tf.add_n(terms)
        else:
            terms = [keras_trainer.share_of_replica(t) for t in tasks(batch[1], y_pred)]
            extra = keras_trainer.additional_losses(model)
            rest = tf.add_n(extra) if extra else None
            total = sum([*terms, *extra])
        self.note(total)
        rest = None if rest is None else self._scaled(rest)
        return [self._scaled(term) for term in terms], rest, y_pred

    def state(self) -> Any:
        return [(v, tf.identity(v.value)) for v in self._runtime.volatile_variables()]

    def gradients_at(
        self,
        batch: Batch,
        values: list[Any] | None = None,
        state: Any = None,
        example: Any = None,
    ) -> tuple[tf.Tensor, list[Any]]:
        variables = self.variables()
        points = [v.value for v in variables] if values is None else values
        # A bare variable is read without Keras, so it has to take the value itself.
        sources = [
            v.value if isinstance(v, AdoptedVariable) else tf.identity(point)
            for v, point in zip(variables, points, strict=True)
        ]
        bare = [v for v in [*variables, *self._volatile()] if isinstance(v, AdoptedVariable)]
        with _kept(bare):
            if values is not None:
                for variable, value in zip(variables, values, strict=True):
                    if isinstance(variable, AdoptedVariable):
                        variable.assign(value)
            begin = [(v, _for_example(v, value, example)) for v, value in state or ()]
            mapping = [*begin, *zip(variables, sources, strict=True)]
            mapping = [(v, value) for v, value in mapping if not isinstance(v, AdoptedVariable)]
            with _TapeOf(sources) as tape, keras.StatelessScope(mapping, collect_losses=True):
                loss = self._scaled(self._loss(batch)[0])
            return loss, tape.gradient(loss, sources)

    def steps(self) -> tf.Tensor:
        optimizer = self._model.optimizer
        return (
            tf.constant(0, tf.int64)
            if optimizer is None
            else tf.cast(optimizer.iterations, tf.int64)
        )

    def layers(self) -> list[Any]:
        return layers_of(self._model)

    def is_kernel(self, variable: Any) -> bool:
        return self._runtime.unit(variable).is_kernel

    def loss_scale(self) -> tuple[tf.Tensor | None, bool]:
        optimizer = self._model.optimizer
        return optimizers.loss_scale(optimizer), optimizers.is_dynamic(optimizer)

    def num_replicas(self) -> int:
        return replicas.count()

    def is_first_replica(self) -> Any:
        context = tf.distribute.get_replica_context()
        return True if context is None else context.replica_id_in_sync_group == 0

    def sum_over_replicas(self, values: Any) -> Any:
        return replicas.sum_over(values)

    def variables(self) -> list[Any]:
        return self._model.trainable_variables

    def batch_size(self, batch: Batch) -> Any:
        return keras_trainer.static_batch_size(batch[0])

    def weight(self, batch: Batch, outputs: Any) -> tf.Tensor:
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

    def _loss(self, batch: Batch) -> tuple[tf.Tensor, Any]:
        y_pred = keras_trainer.forward(self._model, batch[0], self._training)
        return keras_trainer.compute_loss(self._model, batch, y_pred, self._training), y_pred

    def _scaled(self, loss: Any) -> Any:
        optimizer = self._model.optimizer
        return loss if optimizer is None else optimizer.scale_loss(loss)

    def _volatile(self) -> list[Any]:
        return self._runtime.volatile_variables()


class _TapeOf(tf.GradientTape):
    """A tape with nothing but some tensors or variables in it: what leads to others
    only is not even recorded."""

    def __init__(self, sources: Sequence[Any], persistent: bool = False) -> None:
        super().__init__(persistent=persistent, watch_accessed_variables=False)
        self._tapefit_sources = sources

    def __enter__(self) -> _TapeOf:
        super().__enter__()
        for source in self._tapefit_sources:
            self.watch(source)
        return self


@contextlib.contextmanager
def _kept(variables: Sequence[Any]) -> Iterator[None]:
    """Puts variables back, bit for bit, to what they were."""
    before = [tf.identity(v.value) for v in variables]
    try:
        yield
    finally:
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)


def _for_example(variable: Any, value: Any, example: Any) -> Any:
    if example is None or not trainable.is_seed(variable):
        return value
    # The second number counts the draws: far beyond what it will ever get to.
    apart = tf.stack([tf.zeros((), tf.int64), (tf.cast(example, tf.int64) + 1) * 2**32])
    return value + tf.cast(apart, value.dtype)
