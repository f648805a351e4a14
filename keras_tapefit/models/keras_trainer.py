"""What the Keras trainer hides.

Private names used here: `Model._compute_loss`, `_loss_tracker`,
`_call_has_training_arg`, `_make_function`, `_get_metrics_result_or_logs`,
`_distribute_strategy`, and `keras.src.losses.loss.unscale_loss_for_distribution`. Checked
with Keras 3.15.1; `tests/models/test_private_names.py` fails when they change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from keras.src.losses.loss import unscale_loss_for_distribution


def forward(model: Any, x: Any, training: bool) -> Any:
    """Calls the model, with `training` where its `call` takes it."""
    return model(x, training=training) if model._call_has_training_arg else model(x)


def compute_loss(model: Any, batch: tuple[Any, Any, Any], y_pred: Any, training: bool) -> Any:
    """Calls `compute_loss`, of the signature with or without `training`."""
    x, y, sample_weight = batch
    return model._compute_loss(
        x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training
    )


def track_loss(model: Any, loss: Any, x: Any) -> None:
    """Adds a batch's loss to the epoch mean, weighted by the batch size."""
    model._loss_tracker.update_state(
        unscale_loss_for_distribution(loss), sample_weight=batch_size(x)
    )


def batch_size(x: Any) -> tf.Tensor:
    """Returns the size of the first axis of a batch, a scalar int32."""
    # Not `tf.nest`: the two differ on None and on the order of dictionaries.
    first = next(value for value in keras.tree.flatten(x) if value is not None)
    return tf.shape(first)[0]


def loss_tracker(model: Any) -> Any:
    """Returns the metric that holds the epoch mean of the loss, or `None`."""
    return model._loss_tracker


def make_function(model: Any, step: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Returns a function of an iterator that runs `step`, traced as compiled."""
    return model._make_function(step)


def strategy_of(model: Any) -> Any:
    """Returns the strategy in whose scope the model was made, or `None`."""
    return model._distribute_strategy
