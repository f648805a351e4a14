"""Access to the private side of the Keras trainer.

Private names used here: `Model._loss_tracker`, `_assert_compile_called`, `_initial_epoch`,
`_call_has_training_arg`, `_make_function` with `one_step_on_data` and
`multi_step_on_iterator` in it, `_get_metrics_result_or_logs`,
`_distribute_strategy`, `_symbolic_build`, `_maybe_symbolic_build`, `_compile_metrics`,
`_compile_loss`, `TFEpochIterator._distributed_dataset`,
`keras.src.models.functional.Functional`,
`keras.src.backend.compute_output_spec`,
`keras.src.backend.tensorflow.trainer.reduce_per_replica`, and of
`keras.src.backend.common.masking` `get_keras_mask` and `set_keras_mask`.
Checked with Keras 3.15.1; `tests/models/test_private_names.py` fails when they change.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common.masking import get_keras_mask, set_keras_mask
from keras.src.backend.tensorflow.trainer import reduce_per_replica
from keras.src.models.functional import Functional

from keras_tapefit.update import replicas


def function_of(method: Any) -> Any:
    """Returns the function that a method is made of, of a class or set on an instance."""
    return getattr(method, "__func__", method)


def overrides(model: Any, *names: str) -> bool:
    """Whether a model has methods of its own instead of those of `keras.Model`."""
    return any(function_of(getattr(model, n)) is not getattr(keras.Model, n) for n in names)


def forward(model: Any, x: Any, training: bool) -> Any:
    """Calls the model, with `training` where its `call` takes it."""
    return model(x, training=training) if takes_training(model) else model(x)


def takes_training(model: Any) -> bool:
    """Whether a model's `call` has an argument `training`."""
    return model._call_has_training_arg


def resumed_epoch(model: Any) -> int:
    """Returns the epoch that a callback has set for a training to begin with, 0 if none."""
    return model._initial_epoch or 0


def resume_at(model: Any, epoch: int) -> None:
    """Has a training that begins now begin with this epoch."""
    model._initial_epoch = epoch


def check_compiled(model: Any, method: str) -> None:
    """Raises Keras's `ValueError` for a method of a model that is not compiled."""
    model._assert_compile_called(method)


def track_loss(model: Any, loss: Any, examples: Any, all_examples: Any) -> None:
    """Adds a batch's loss to the epoch mean, weighted by the batch size.

    Args:
        model: the model.
        loss: this replica's share of the loss.
        examples: the number of this replica's examples.
        all_examples: that of all replicas; on one replica the same.
    """
    if replicas.count() > 1:
        # The shares add up to the loss, whatever each replica's part is.
        factor = tf.math.divide_no_nan(all_examples, examples)
        loss = tf.math.multiply_no_nan(loss, tf.cast(factor, loss.dtype))
    model._loss_tracker.update_state(loss, sample_weight=examples)


def update_tracker(model: Any, loss: Any, examples: Any) -> None:
    """Adds the loss of a replica's part of a batch to the epoch mean."""
    loss = tf.convert_to_tensor(loss)
    if replicas.count() > 1:
        # A replica without an example of the last batch has no number for a mean.
        loss = tf.where(examples > 0, loss, tf.zeros_like(loss))
    model._loss_tracker.update_state(loss, sample_weight=examples)


def first_array(x: Any) -> Any:
    """Returns the first array in a structure, `None` where there is none."""
    # Not `tf.nest`: the two differ on None and on the order of dictionaries.
    return next((value for value in keras.tree.flatten(x) if value is not None), None)


def static_batch_size(x: Any) -> Any:
    """Returns the batch size as an integer where it is known, else as a scalar tensor."""
    first = first_array(x)
    known = first.shape[0]
    return tf.shape(first)[0] if known is None else int(known)


def check_batch(batch: Any) -> None:
    """Raises `ValueError` where the parts of a batch have different numbers of examples."""
    values = [value for value in keras.tree.flatten(batch) if value is not None]
    sizes = {int(v.shape[0]) for v in values if v.shape.rank and v.shape[0] is not None}
    if len(sizes) > 1 or 0 in sizes:
        raise ValueError(
            "Inputs, targets and sample weights must have the same number of examples, and at "
            f"least one. Received: {', '.join(map(str, sorted(sizes)))}."
        )


def may_be_empty(x: Any) -> bool:
    """Whether a part of a batch may have no example, as a replica's or a micro-batch may."""
    size = static_batch_size(x)
    return not isinstance(size, int) or size == 0


def masks_of(y_pred: Any) -> list[Any]:
    """Returns the mask of each output, flat; `None` where there is none."""
    return [get_keras_mask(output) for output in keras.tree.flatten(y_pred)]


def set_masks(y_pred: Any, masks: list[Any]) -> None:
    """Gives each output its mask, which losses and metrics look for."""
    for output, mask in zip(keras.tree.flatten(y_pred), masks, strict=True):
        if mask is not None:
            set_keras_mask(output, mask)


def loss_tracker(model: Any) -> Any:
    """Returns the metric that holds the epoch mean of the loss, or `None`."""
    return model._loss_tracker


class Fetched:
    """The batches of one execution; iterates once.

    Args:
        source: an iterator over batches.
        num_batches: of the execution.

    Attributes:
        element_spec: of the batches, with the shapes that are known of all of them;
            `None`: it is not known.

    Raises:
        StopIteration: when none are left.
    """

    def __init__(self, source: Any, num_batches: int) -> None:
        self.element_spec = getattr(source, "element_spec", None)
        specs = tf.nest.flatten(self.element_spec)
        if any(isinstance(s, tf.OptionalSpec) or not isinstance(s, tf.TypeSpec) for s in specs):
            self.element_spec = None
        try:
            batches = list(itertools.islice(iter(source), num_batches))
        except tf.errors.OutOfRangeError:
            batches = []
        if not batches:
            raise StopIteration
        self._batches = iter(batches)

    def __iter__(self) -> Iterator[Any]:
        return self._batches


class StepFunction:
    """Keras's function of an iterator that runs a step, traced as compiled.

    Batches that are `Fetched` have in it the shapes that are known of all batches, as
    those have that are taken from an iterator inside; else numbers may be rounded
    differently.

    Args:
        model: the model.
        step: takes a batch and returns logs.

    Attributes:
        on_batch: what is traced where batches are fetched; `None`: nothing.
        on_iterator: what is traced where they are not; `None`: nothing.
    """

    def __init__(self, model: Any, step: Callable[[Any], Any]) -> None:
        self._of_keras = model._make_function(step)
        self.on_batch: Any = None
        self.on_iterator: Any = None
        if not model.run_eagerly:
            inside = inspect.getclosurevars(self._of_keras).nonlocals
            self.on_batch = inside["one_step_on_data"].__wrapped__
            self.on_iterator = inside["multi_step_on_iterator"]
        self._traced: tuple[Any, Any] = (None, None)

    def __call__(self, iterator: Any) -> Any:
        spec = getattr(iterator, "element_spec", None)
        if not isinstance(iterator, Fetched) or spec is None or self.on_batch is None:
            return self._of_keras(iterator)
        if self._traced[0] != spec:
            self._traced = spec, self.on_batch.get_concrete_function(spec)
        return on_each(self._traced[1], iterator)


def on_each(function: Callable[[Any], Any], batches: Any) -> Any:
    """Calls a function with each batch; returns the last logs."""
    logs = None
    for batch in batches:
        logs = function(batch)
    return logs


def reduced_logs(model: Any, logs: Any) -> Any:
    """Returns the logs of all replicas as one, as Keras reduces them."""
    return reduce_per_replica(logs, model.distribute_strategy, reduction="auto")


def strategy_of(model: Any) -> Any:
    """Returns the strategy that the model is trained with, or `None`.

    That in whose scope it was made; else, as Keras has it, that of the caller's scope.
    """
    strategy = model._distribute_strategy
    if strategy is None and tf.distribute.has_strategy():
        return tf.distribute.get_strategy()
    return strategy


def keep_strategy(model: Any) -> None:
    """Has a model belong to the strategy it is trained with."""
    model._distribute_strategy = strategy_of(model)


def symbolic_build(model: Any, data_batch: Any) -> None:
    """Makes the model's weights for a batch of this shape, in its strategy's scope."""
    with model.distribute_strategy.scope():
        model._symbolic_build(data_batch=data_batch)


def is_built(model: Any) -> bool:
    """Whether a model has its weights, or cannot be built by a batch."""
    return model.built and all(layer.built for layer in model.layers)


def build_from_spec(model: Any, epoch_iterator: Any, data_batch: Any = None) -> None:
    """Makes the state of a model, its losses and metrics, but not of its optimizer.

    Keras leaves that to the first step. No batch is taken for it: shuffling continues as it
    would have.

    Args:
        model: the model.
        epoch_iterator: the `TFEpochIterator` of `fit` or `evaluate`, or `None`.
        data_batch: a batch, if `iterator` is `None`.
    """
    spec = _spec_of(epoch_iterator, data_batch)
    if spec is not None and strategy_of(model) is None:
        build(model, spec)


def _spec_of(epoch_iterator: Any, data_batch: Any) -> Any:
    """Returns shapes and types of a batch, of an iterator or as the batch has them."""
    if epoch_iterator is None:
        return data_batch
    return getattr(epoch_iterator._distributed_dataset, "element_spec", None)


def shows_outputs(model: Any) -> bool:
    """Whether losses and metrics see nothing but the known outputs of a model."""
    is_known = function_of(model.call) in (Functional.call, keras.Sequential.call)
    return is_known and not overrides(model, "compute_loss", "compute_metrics")


def build_losses(model: Any, epoch_iterator: Any, data_batch: Any) -> None:
    """Makes losses and metrics of a model whose outputs are known, without a call of any.

    Args:
        model: a model that `shows_outputs`; one that has none yet is left to its first step.
        epoch_iterator: the `TFEpochIterator` of `fit` or `evaluate`, or `None`.
        data_batch: a batch, if `iterator` is `None`.
    """
    both = [m for m in (model._compile_metrics, model._compile_loss) if m is not None]
    missing = [m for m in both if not m.built]
    spec = _spec_of(epoch_iterator, data_batch)
    # Asked before each call of `train_on_batch` too.
    if not missing or spec is None or not getattr(model, "outputs", None):
        return
    if model.optimizer is None:
        return
    outputs = model.outputs if isinstance(model, keras.Sequential) else model.output
    if isinstance(outputs, list | tuple) and len(outputs) == 1:
        # A call returns it alone.
        outputs = outputs[0]

    # Not by calling them: they may count their calls, or draw numbers.
    try:
        _, y, _ = keras.utils.unpack_x_y_sample_weight(spec)
        if y is None:
            return
        # Not as Keras's symbolic tensors, whose names it would take for those of losses.
        y, outputs = (keras.tree.map_structure(_described, tree) for tree in (y, outputs))
        # As the call of a loss has it: a list may stand for a tuple.
        keras.tree.assert_same_paths(y, outputs)
        arranged = keras.tree.pack_sequence_as(outputs, keras.tree.flatten(y))
        for each in missing:
            each.build(arranged if each is model._compile_loss else y, outputs)
    except Exception:
        # The first step builds what is left, or shows what is wrong.
        return


def _described(value: Any) -> Any:
    return None if value is None else tf.TensorSpec(value.shape, value.dtype)


def build(model: Any, data_batch: Any) -> None:
    """Makes the state of a model for a batch of this shape, if Keras can do it."""
    optimizer = model.optimizer
    was_built = optimizer is None or optimizer.built
    if optimizer is not None:
        optimizer.built = True
    try:
        model._symbolic_build(data_batch=keras.utils.unpack_x_y_sample_weight(data_batch))
    except Exception:
        # The first step builds what is left, or shows what is wrong.
        return
    finally:
        if optimizer is not None:
            optimizer.built = was_built


def may_run_out(epoch_iterator: Any) -> bool:
    """Whether data may end before Keras expects it to: in the middle of a `fit`."""
    given = getattr(epoch_iterator, "steps_per_epoch", None)
    return given is not None or getattr(epoch_iterator, "num_batches", None) is None


def as_tensor(value: Any) -> Any:
    """Returns an array as a tensor; sparse and ragged ones, and `None`, as they are."""
    composite = isinstance(value, tf.SparseTensor | tf.RaggedTensor)
    return value if value is None or composite else tf.convert_to_tensor(value)
