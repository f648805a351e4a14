"""What every way to get gradients has in common."""

from __future__ import annotations

from typing import Any, Protocol

import keras
import tensorflow as tf

from keras_tapefit.gradients import Gradients


class Objective(Protocol):
    """The loss of a model on a batch, as a way to get gradients sees it."""

    def tape(self) -> tf.GradientTape:
        """Returns a tape that watches the variables being trained."""

    def loss(self, batch: tuple[Any, Any, Any]) -> tuple[tf.Tensor, Any]:
        """Runs the forward pass, in training mode, and the loss.

        Args:
            batch: `(x, y, sample_weight)`.

        Returns:
            The scalar loss, times the loss scale, and the model's outputs.
        """

    def variables(self) -> list[Any]:
        """Returns the variables being trained; to be asked after the forward pass."""


class GradientMethod:
    """Base class of the ways to get gradients: `compile(backward=...)`."""

    def compute(
        self, objective: Objective, batch: tuple[Any, Any, Any]
    ) -> tuple[Gradients, Any]:
        """Returns the gradients of the loss on a batch, and the model's outputs.

        Args:
            objective: the loss of the model.
            batch: `(x, y, sample_weight)`.

        Returns:
            `Gradients`, times the loss scale, and the outputs of the forward pass that
            counts for the metrics.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `compute`.")

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments of `__init__`."""
        return {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GradientMethod:
        """Returns the method that a config describes."""
        return cls(**config)


def check_backward(value: Any) -> GradientMethod:
    """Returns `value`, or raises `TypeError` where it is no way to get gradients."""
    if isinstance(value, GradientMethod):
        return value
    raise TypeError(
        "`backward` must be one of `keras_tapefit.backward`, such as "
        f"`backward.Backpropagation()`. Received: {value!r} (of type "
        f"{type(value).__name__})."
    )


register = keras.saving.register_keras_serializable("keras_tapefit")
