"""The loss of a model, as the ways to get gradients see it."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import keras
import tensorflow as tf

from keras_tapefit.backward.base import Batch, Forward, Quotient, part_of, sum_of
from keras_tapefit.backward.taps import Taps
from keras_tapefit.gradients import layers_of
from keras_tapefit.gradients.layers import named_layers
from keras_tapefit.training import keras_trainer, losses
from keras_tapefit.training.bare_variables import AdoptedVariable
from keras_tapefit.training.runtime import Runtime
from keras_tapefit.training.step import open_step
from keras_tapefit.update import optimizers, replicas, trainable
from keras_tapefit.update.rollback import Rollback


class ModelObjective:
    """See `keras_tapefit.backward.base.Objective`.

    Args:
        runtime: the private side of the model.
        training: whether layers run as in training.
        apart: whether quotients are kept apart, to be put together with those of other
            parts: of micro-batches, or of the steps of a window.
    """

    def __init__(self, runtime: Runtime, training: bool = True, apart: bool = False) -> None:
        self._model = runtime.model
        self._runtime = runtime
        self._training = training
        self._apart = apart
        # Replicas get unequal parts of an uneven batch, micro-batches of a small one.
        self._may_be_empty = replicas.count() > 1 or runtime.micro_batches > 1
        self._whole: tf.Tensor | None = None

    def of_parts(self, size: Any) -> ModelObjective:
        if replicas.count() > 1 or self._runtime.taps() is not None:
            return self
        found = copy.copy(self)
        found._whole = tf.cast(size, tf.float32)
        return found

    def tape(self, persistent: bool = False) -> tf.GradientTape:
        model = self._model
        variables = model.trainable_variables
        persistent = persistent or self._apart
        if not model.built or len(variables) == len(self._runtime.candidates()):
            return tf.GradientTape(persistent=persistent)
        return _TapeOf([v.value for v in variables], persistent)

    def by_example(
        self, batch: Batch, around: Callable[[], AbstractContextManager[Any]]
    ) -> tuple[Forward, tf.Tensor | None, str | None]:
        model = self._model
        losses.build_missing(model, batch)
        with losses.hearing(model) as heard:
            forward = self._forward(batch, around)
        if len(model.losses) > len(self._regularized()):
            return forward, None, "there is a loss that a layer adds"
        return forward, *losses.of_examples(model, heard)

    def first_axes(self, batch: Batch, calls: Any, size: int) -> set[int | None]:
        if not any(map(_may_fold, named_layers(self._model))) and not _may_fold(("", self._model)):
            return {size}
        trial = type(calls)(calls.layers)
        flat = [v for v in keras.tree.flatten(batch[0]) if v is not None]

        def run(*values: Any) -> None:
            left = iter(values)
            x = keras.tree.map_structure(lambda v: None if v is None else next(left), batch[0])
            with trial.tape, trial.watching():
                keras_trainer.forward(self._model, x, self._training)

        specs = [tf.TensorSpec([size, *v.shape[1:]], v.dtype) for v in flat]
        try:
            tf.function(run, autograph=False).get_concrete_function(*specs)
        except Exception:
            # What cannot be tried is not known.
            return {None}
        return trial.first_axes() if trial.is_like(calls) else {None}

    def regularization(self) -> list[Any]:
        regularized = {id(v) for v in self._regularized()}
        if not regularized:
            return [None] * len(self.variables())
        sources = [v.value for v in self.variables()]
        with _TapeOf(sources) as tape, losses.undivided():
            total = tf.add_n(losses.additional(self._model))
        return tape.gradient(total, sources)

    def _regularized(self) -> list[Any]:
        return [v for v in self.variables() if getattr(v, "regularizer", None) is not None]

    def forward(self, batch: Batch) -> Forward:
        return self._forward(batch, contextlib.nullcontext)

    def _forward(self, batch: Batch, around: Callable[[], AbstractContextManager[Any]]) -> Forward:
        examples, counts = self._examples(batch)
        with self._undone_unless(counts), losses.undivided(), self._tapped() as taps:
            with around():
                y_pred = keras_trainer.forward(self._model, batch[0], self._training)
            found = self._quotients(batch, y_pred, examples)
        self._check_taps(taps, found)
        shares, all_examples = self._shares(found, examples)
        found = [
            Quotient(
                part_of(quotient.loss, share),
                divisor,
                {place: part_of(value, share) for place, value in quotient.terms.items()},
                weight=self._weight(divisor, examples),
            )
            for quotient, (share, divisor) in zip(found, shares, strict=True)
        ]
        factors = [share for share, _ in shares]
        if not self._apart and len(found) > 1:
            terms = {place: v for quotient in found for place, v in quotient.terms.items()}
            found = [Quotient(sum_of([q.loss for q in found]), all_examples, terms)]
        scaled = [self._scaled(part_of(q.loss, q.weight)) for q in found]
        if taps is not None:
            taps.inputs, taps.loss = batch, sum_of([quotient.loss for quotient in found])
        return Forward(found, scaled, factors, y_pred, examples, all_examples, counts, taps)

    def tasks(self, batch: Batch, tasks: Any = None) -> tuple[list[Any], Any, Forward]:
        model = self._model
        if tasks is None:
            losses.build(model, batch)
        examples, counts = self._examples(batch)
        with self._undone_unless(counts), losses.undivided(), self._tapped() as taps:
            y_pred = keras_trainer.forward(model, batch[0], training=True)
            if tasks is None:
                total, terms = losses.separate(model, batch, y_pred, training=True)
                each = [Quotient(term.weighted, term.divisor) for term in terms]
                self._check_alike(terms)
                rest = losses.additional(model)
                if losses.overrides_compute_loss(model):
                    # Of the terms nothing is left but this: their slopes cancel exactly.
                    rest = [total - tf.add_n([q.loss for q in each])]
            else:
                terms = []
                each = [Quotient(loss, examples) for loss in tasks(batch[1], y_pred)]
                rest = losses.additional(model)
        shares, all_examples = self._shares([*each, Quotient(tf.zeros(()), examples)], examples)
        values = [part_of(q.loss, s) for q, (s, _) in zip(each, shares, strict=False)]
        extra = [part_of(loss, shares[-1][0]) for loss in rest]
        logged = {t.place: part_of(t.value, s) for t, (s, _) in zip(terms, shares, strict=False)}
        whole = Quotient(sum([*values, *extra]), all_examples, logged)
        if taps is not None:
            taps.inputs, taps.loss = batch, whole.loss
        forward = Forward(
            [whole], [whole.loss], [shares[-1][0]], y_pred, examples, all_examples, counts, taps
        )
        scaled_rest = self._scaled(tf.add_n(extra)) if extra else None
        return [self._scaled(value) for value in values], scaled_rest, forward

    def _tapped(self, replaces: bool = False) -> Any:
        """Opens the taps that hooks ask for, if any do; see `Runtime.taps`."""
        taps = self._runtime.taps(replaces) if self._training else None
        return contextlib.nullcontext() if taps is None else taps.tapping()

    def _check_taps(self, taps: Taps | None, quotients: Sequence[Quotient]) -> None:
        if taps is not None and self._apart and len(quotients) > 1:
            names = [h.name for h in self._runtime.hooks.of_outputs if not h.may_skip_steps]
            if names:
                raise ValueError(
                    f"The hook {names[0]!r} looks at gradients of layer outputs. That cannot be "
                    "used with `micro_batches` or `gradient_accumulation_steps` where the "
                    "losses are not all divided by the same number: one is masked, weighted "
                    "or a sum, and another one is not. Train on whole batches."
                )

    def _check_alike(self, terms: Sequence[losses.Term]) -> None:
        if self._apart and len({term.kind for term in terms}) > 1:
            raise ValueError(
                "`ProjectedConflicts` cannot be used with `micro_batches` or "
                "`gradient_accumulation_steps` where the losses are not all divided by the "
                "same number: one is masked, weighted or a sum, and another one is not. "
                "Train on whole batches, or give `tasks` that are means over examples."
            )

    def _examples(self, batch: Batch) -> tuple[tf.Tensor, tf.Tensor | None]:
        """Returns the number of examples, and where there may be none whether there are."""
        examples = losses.batch_shape(batch[0])
        may_be_empty = self._may_be_empty and keras_trainer.may_be_empty(batch[0])
        return examples, examples > 0 if may_be_empty else None

    @contextlib.contextmanager
    def _undone_unless(self, counts: tf.Tensor | None) -> Iterator[None]:
        """Undoes what the forward pass of no example makes of statistics."""
        if counts is None:
            yield
            return
        # Replicas draw their random numbers in step.
        kept = [
            v
            for v in self._runtime.state.changed_by_forward()
            if replicas.count() == 1 or not trainable.is_seed(v)
        ]
        rollback = Rollback(kept)
        yield
        rollback.restore_unless(counts)

    def _quotients(self, batch: Batch, y_pred: Any, examples: tf.Tensor) -> list[Quotient]:
        apart = self._apart or replicas.count() > 1
        return losses.quotients(self._model, batch, y_pred, self._training, examples, apart)

    def _weight(self, divisor: Any, examples: tf.Tensor) -> tf.Tensor | None:
        whole = self._whole
        if whole is None or divisor is not examples:
            return None
        return tf.math.divide_no_nan(examples, whole)

    def _shares(
        self, quotients: Sequence[Quotient], examples: tf.Tensor
    ) -> tuple[list[tuple[Any, Any]], tf.Tensor]:
        """Returns what this replica's quotients count for.

        Returns:
            For each its share, `None` for all of it, and the divisor of all replicas;
            and the number of examples of all replicas.
        """
        if replicas.count() == 1:
            return [(None, q.divisor) for q in quotients], examples
        local = tf.stack([examples, *(q.divisor for q in quotients if q.divisor is not None)])
        total = replicas.sum_over(local)
        share = tf.math.divide_no_nan(local, total)
        place, found = 0, []
        for quotient in quotients:
            if quotient.divisor is None:
                found.append((None, None))
                continue
            place += 1
            found.append((share[place], total[place]))
        return found, total[0]

    def state(self) -> Any:
        return [(v, tf.identity(v.value)) for v in self._volatile()]

    def gradients_at(
        self,
        batch: Batch,
        values: list[Any] | None = None,
        state: Any = None,
        example: Any = None,
        like: Forward | None = None,
    ) -> tuple[tf.Tensor, list[list[Any]]]:
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
            stateless = keras.StatelessScope(mapping, collect_losses=True)
            with _TapeOf(sources, persistent=like is not None) as tape, stateless:
                scaled = self._scaled_again(batch, like)
                for variable, value in mapping[len(begin) :]:
                    if stateless.get_current_value(variable) is not value:
                        raise ValueError(
                            f"The weight {variable.path!r} is assigned in the forward pass, as "
                            "SpectralNormalization does, so that the pass cannot be repeated: "
                            "`backward.Backpropagation()` alone can be used."
                        )
            found = [tape.gradient(loss, sources) for loss in scaled]
            return sum_of(scaled), found

    def _scaled_again(self, batch: Batch, like: Forward | None) -> list[tf.Tensor]:
        with losses.undivided(), self._tapped(replaces=True):
            y_pred = keras_trainer.forward(self._model, batch[0], self._training)
            if like is None:
                return [self._scaled(losses.compute(self._model, batch, y_pred, self._training))]
            found = self._quotients(batch, y_pred, like.examples)
        values = [part_of(q.loss, s) for q, s in zip(found, like.shares, strict=True)]
        return [self._scaled(v) for v in (values if self._apart else [sum_of(values)])]

    def steps(self) -> tf.Tensor:
        return optimizers.updates_made(self._model.optimizer)

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

    def part(self, batch: Batch, start: Any, stop: Any, size: int | None = None) -> Batch:
        rows = lambda v: None if v is None else _rows(v, start, stop, size)  # noqa: E731
        return keras.tree.map_structure(rows, batch)

    def may_loop(self) -> bool:
        if tf.executing_eagerly() or self._model.jit_compile or replicas.count() > 1:
            # XLA has to know the size of each part, and replicas meet in the forward pass.
            return False
        # Outside the loop nothing can be read but what it returns.
        custom = keras_trainer.overrides(self._model, "compute_metrics")
        return not custom and open_step(self._runtime) is None and self._runtime.taps() is None

    def masks(self, outputs: Any) -> list[Any]:
        return keras_trainer.masks_of(outputs)

    def set_masks(self, outputs: Any, masks: list[Any]) -> None:
        keras_trainer.set_masks(outputs, masks)

    def _scaled(self, loss: Any) -> Any:
        optimizer = self._model.optimizer
        return loss if optimizer is None else optimizer.scale_loss(loss)

    def _volatile(self) -> list[Any]:
        return self._runtime.state.changed_by_forward()


def _may_fold(named: tuple[str, Any]) -> bool:
    """Whether a layer runs custom code, or is a single operation."""
    layer = named[1]
    if isinstance(layer, keras.layers.Lambda) or not isinstance(layer, keras.layers.Layer):
        return True
    return not type(layer).call.__module__.startswith("keras.src.")


def _rows(value: Any, start: Any, stop: Any, size: int | None) -> Any:
    if not isinstance(value, tf.SparseTensor):
        rows = value[start:stop]
        if size is not None and isinstance(rows, tf.Tensor):
            rows.set_shape([size, *rows.shape[1:]])
        return rows
    shape = value.dense_shape
    start, size = tf.cast(start, tf.int64), tf.cast(stop - start, tf.int64)
    begin = tf.concat([[start], tf.zeros_like(shape[1:])], axis=0)
    return tf.sparse.slice(value, begin, tf.concat([[size], shape[1:]], axis=0))


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
