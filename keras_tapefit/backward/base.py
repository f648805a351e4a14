"""What every way to get gradients has in common."""

from __future__ import annotations

from typing import Any, Protocol

import keras
import tensorflow as tf

from keras_tapefit.gradients import Gradients


Batch = tuple[Any, Any, Any]
"""`(x, y, sample_weight)`."""


class Objective(Protocol):
    """The loss of a model on a batch, as a way to get gradients sees it.

    Attributes:
        noted: the loss of the last forward pass, without loss scale.
        wants_parts: whether the norms of the parts of a batch are asked for.
    """

    noted: Any

    @property
    def wants_parts(self) -> bool: ...

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

    def batch_size(self, batch: Batch) -> Any:
        """Returns the number of examples: an integer where it is known, else a tensor."""

    def weight(self, batch: Batch, outputs: Any) -> tf.Tensor:
        """Returns the weight of a part of a batch in the loss of the whole.

        Args:
            batch: the part.
            outputs: of the model on the part.
        """

    def masks(self, outputs: Any) -> list[Any]:
        """Returns the mask of each output, flat, `None` where there is none."""

    def set_masks(self, outputs: Any, masks: list[Any]) -> None:
        """Gives each output its mask."""

    def note(self, loss: Any) -> None:
        """Says what the loss of the step is, for hooks and records."""

    def note_parts(self, norms: tf.Tensor, weights: tf.Tensor) -> None:
        """Says how large the gradients of the parts of the batch are.

        Args:
            norms: of shape `[num_parts]`.
            weights: of shape `[num_parts]`, as `weight` gives them.
        """


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
