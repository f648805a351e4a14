"""What the Keras trainer hides.

Private names used here: `Model._compute_loss`, `_loss_tracker`, `_assert_compile_called`,
`_call_has_training_arg`, `_make_function`, `_get_metrics_result_or_logs`,
`_distribute_strategy`, `_symbolic_build`, `_maybe_symbolic_build`,
`TFEpochIterator._distributed_dataset`,
`_compile_loss`, `CompileLoss._flat_losses`, `_aggregate_additional_loss`,
`keras.src.backend.tensorflow.trainer.reduce_per_replica`,
`keras.src.losses.loss.unscale_loss_for_distribution` and
`scale_loss_for_distribution`, and of
`keras.src.backend.common.masking` `get_keras_mask` and `set_keras_mask`.
Checked with Keras 3.15.1; `tests/models/test_private_names.py` fails when they change.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from keras.src.backend.common.masking import get_keras_mask, set_keras_mask
from keras.src.backend.tensorflow.trainer import reduce_per_replica
from keras.src.losses.loss import scale_loss_for_distribution, unscale_loss_for_distribution

from keras_tapefit.update import replicas


def forward(model: Any, x: Any, training: bool) -> Any:
    """Calls the model, with `training` where its `call` takes it."""
    return model(x, training=training) if takes_training(model) else model(x)


def takes_training(model: Any) -> bool:
    """Whether a model's `call` has an argument `training`."""
    return model._call_has_training_arg


def check_compiled(model: Any, method: str) -> None:
    """Raises Keras's `ValueError` for a method of a model that is not compiled."""
    model._assert_compile_called(method)


def compute_loss(model: Any, batch: tuple[Any, Any, Any], y_pred: Any, training: bool) -> Any:
    """Calls `compute_loss`, of the signature with or without `training`."""
    x, y, sample_weight = batch
    loss = model._compute_loss(
        x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training
    )
    # Of a replica without an example Keras gives the losses of none, not their mean.
    return loss if replicas.count() == 1 else tf.reduce_sum(loss)


def build_losses(model: Any, batch: tuple[Any, Any, Any]) -> None:
    """Has a model look up what its losses are; to be called before the forward pass.

    Raises:
        ValueError: when the model is compiled without a loss.
    """
    if model._compile_loss is None:
        raise ValueError(
            "There are no losses to tell apart: the model is compiled without any. Pass "
            "`loss` to `compile`, one for each output, or give `tasks`."
        )
    if not model._compile_loss.built:
        model._symbolic_build(data_batch=batch)


def separate_losses(model: Any, batch: tuple[Any, Any, Any], y_pred: Any) -> tuple[Any, list[Any]]:
    """Calls `compute_loss`, and listens to the losses that it calls in turn.

    Returns:
        The loss, and of each loss that the model is compiled with its term therein,
        `loss_weights` included.
    """
    compiled = model._compile_loss
    compiled._flat_losses[:] = [
        item if isinstance(item.loss, _Listened) else item._replace(loss=_Listened(item.loss))
        for item in compiled._flat_losses
    ]
    heard: list[Any] = []
    _heard.values = heard
    try:
        total = compute_loss(model, batch, y_pred, training=True)
    finally:
        _heard.values = None
    terms = []
    for item, value in zip(compiled._flat_losses, heard, strict=False):
        value = tf.cast(value, compiled.dtype)
        terms.append(value if item.loss_weights is None else value * item.loss_weights)
    return total, terms


class _Listened:
    """A loss that tells what it gave, in the thread that listens.

    Args:
        loss: the loss.
    """

    def __init__(self, loss: Any) -> None:
        self._loss = loss

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        value = self._loss(*args, **kwargs)
        if _heard.values is not None:
            _heard.values.append(value)
        return value


class _Heard(threading.local):
    values: list[Any] | None = None


_heard = _Heard()


def additional_losses(model: Any) -> list[Any]:
    """Returns what comes to the loss beside the compiled ones, one scalar each."""
    return [model._aggregate_additional_loss(loss) for loss in model.losses]


def overrides_compute_loss(model: Any) -> bool:
    """Whether the loss is computed in a way of the model's own."""
    return type(model).compute_loss is not keras.Model.compute_loss


def averages_examples(model: Any) -> bool:
    """Whether the loss of a batch is known to be a mean over its examples."""
    return not overrides_compute_loss(model) and all(
        loss.reduction != "sum" for loss in _losses(model)
    )


def share_of_replica(loss: Any) -> Any:
    """Returns what a replica adds to the loss, given the loss of its part of a batch."""
    return scale_loss_for_distribution(loss)


def track_loss(model: Any, loss: Any, x: Any) -> None:
    """Adds a batch's loss to the epoch mean, weighted by the batch size."""
    update_tracker(model, loss, batch_size(x))


def update_tracker(model: Any, loss: Any, weight: Any) -> None:
    """Adds the loss of a replica's part of a batch to the epoch mean, by its weight."""
    if replicas.count() > 1:
        # A replica without an example of the last batch has no number for a mean.
        loss = tf.where(weight > 0, loss, tf.zeros_like(loss))
    model._loss_tracker.update_state(unscale_loss_for_distribution(loss), sample_weight=weight)


def batch_size(x: Any) -> tf.Tensor:
    """Returns the size of the first axis of a batch, a scalar int32."""
    return tf.shape(first_array(x))[0]


def first_array(x: Any) -> Any:
    """Returns the first array in a structure, `None` where there is none."""
    # Not `tf.nest`: the two differ on None and on the order of dictionaries.
    return next((value for value in keras.tree.flatten(x) if value is not None), None)


def static_batch_size(x: Any) -> Any:
    """Returns the batch size as an integer where it is known, else as a scalar tensor."""
    first = first_array(x)
    known = first.shape[0]
    return tf.shape(first)[0] if known is None else int(known)


def loss_weight(model: Any, batch: tuple[Any, Any, Any], y_pred: Any) -> tf.Tensor:
    """Returns by what the loss of a part of a batch counts in that of the whole batch.

    What Keras's reductions divide by: the number of examples; with a mask on the output
    the number of unmasked elements; with `"mean_with_sample_weight"` the total weight.

    Raises:
        ValueError: when a loss is compiled with `reduction="sum"`.
    """
    x, _, sample_weight = batch
    reductions = {loss.reduction for loss in _losses(model)}
    if "sum" in reductions:
        raise ValueError(
            "`micro_batches` needs a loss that is a mean over examples. Received: a loss "
            "with reduction='sum', whose regularization terms would count once for each "
            "part. Use reduction='sum_over_batch_size' and a larger learning rate."
        )
    if reductions == {"mean_with_sample_weight"} and sample_weight is not None:
        weights = keras.tree.flatten(sample_weight)
        return tf.reduce_sum(tf.cast(weights[0], tf.float32))
    masks = masks_of(y_pred)
    if len(masks) == 1 and masks[0] is not None:
        return tf.reduce_sum(tf.cast(masks[0], tf.float32))
    return tf.cast(batch_size(x), tf.float32)


def masks_of(y_pred: Any) -> list[Any]:
    """Returns the mask of each output, flat; `None` where there is none."""
    return [get_keras_mask(output) for output in keras.tree.flatten(y_pred)]


def set_masks(y_pred: Any, masks: list[Any]) -> None:
    """Gives each output its mask, which losses and metrics look for."""
    for output, mask in zip(keras.tree.flatten(y_pred), masks, strict=True):
        if mask is not None:
            set_keras_mask(output, mask)


def _losses(model: Any) -> list[Any]:
    given = keras.tree.flatten(model.loss) if model.loss is not None else []
    return [loss for loss in given if isinstance(loss, keras.losses.Loss)]


def loss_tracker(model: Any) -> Any:
    """Returns the metric that holds the epoch mean of the loss, or `None`."""
    return model._loss_tracker


def make_function(model: Any, step: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Returns a function of an iterator that runs `step`, traced as compiled."""
    return model._make_function(step)


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


def build_from_spec(model: Any, epoch_iterator: Any) -> None:
    """Makes the state of a model, its losses and metrics, but not of its optimizer.

    Keras leaves that to the first step. No batch is taken for it: shuffling goes on as it
    would have.

    Args:
        model: the model.
        epoch_iterator: the `TFEpochIterator` of `fit` or `evaluate`.
    """
    spec = getattr(epoch_iterator._distributed_dataset, "element_spec", None)
    optimizer = model.optimizer
    if spec is None or optimizer is None or strategy_of(model) is not None:
        return
    was_built = optimizer.built
    optimizer.built = True
    try:
        model._symbolic_build(data_batch=spec)
    except Exception:
        # The first step builds what is left, or shows what is wrong.
        return
    finally:
        optimizer.built = was_built
