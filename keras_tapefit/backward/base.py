"""What every way to get gradients has in common."""

from __future__ import annotations

import inspect
import math
import numbers
from typing import Any, ClassVar, Protocol, TypeVar

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

    def tape(self, persistent: bool = False) -> tf.GradientTape:
        """Returns a tape that watches the variables being trained."""

    def loss(self, batch: tuple[Any, Any, Any]) -> tuple[tf.Tensor, Any]:
        """Runs the forward pass, in training mode, and the loss.

        Args:
            batch: `(x, y, sample_weight)`.

        Returns:
            The scalar loss, times the loss scale, and the model's outputs.
        """

    def losses(self, batch: Batch, tasks: Any = None) -> tuple[list[Any], Any, Any]:
        """Runs the forward pass, in training mode, and each loss by itself.

        Args:
            batch: `(x, y, sample_weight)`.
            tasks: a function of the targets and the outputs that returns a list of
                scalars. `None`: the losses that the model is compiled with.

        Returns:
            The scalar losses, weights of `compile` included; what comes to the loss
            beside them, such as regularization, or `None`; both times the loss scale;
            and the model's outputs.
        """

    def state(self) -> Any:
        """Returns what a forward pass may change, as it is now: seeds, statistics."""

    def gradients_at(
        self,
        batch: Batch,
        values: list[Any] | None = None,
        state: Any = None,
        example: Any = None,
    ) -> tuple[tf.Tensor, list[Any]]:
        """Runs a forward and a backward pass that leave nothing behind.

        To be asked after a forward pass that counts.

        Args:
            batch: `(x, y, sample_weight)`.
            values: what `variables()` are to be in these passes; `None`: as they are.
            state: what the passes begin with, as `state()` gave it. That of before the
                pass that counts repeats that pass: the same dropout, say.
            example: a scalar integer; passes with different ones draw different random
                numbers.

        Returns:
            The scalar loss, times the loss scale, and its gradients by `variables()`.
        """

    def steps(self) -> tf.Tensor:
        """Returns the number of updates made so far, a scalar int64."""

    def layers(self) -> list[Any]:
        """Returns the model and all layers in it."""

    def is_kernel(self, variable: Any) -> bool:
        """Returns whether a variable is weights that multiply a layer's input."""

    def loss_scale(self) -> tuple[tf.Tensor | None, bool]:
        """Returns the loss scale, and whether it adapts itself to overflows."""

    def num_replicas(self) -> int:
        """Returns the number of replicas; each has its share of the loss."""

    def is_first_replica(self) -> Any:
        """Returns whether this is the first of the replicas, a scalar bool."""

    def sum_over_replicas(self, values: Any) -> Any:
        """Sums a tensor, or each of a list of tensors, over replicas."""

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


Method = TypeVar("Method", bound="GradientMethod")


class GradientMethod:
    """Base class of the ways to get gradients: `compile(backward=...)`.

    Subclasses implement `compute`. Where the gradient of a batch is not the mean of
    those of its parts, a subclass says `takes_parts = False`.
    """

    takes_parts: ClassVar[bool] = True
    _live: dict[str, tf.Variable]

    def __new__(cls: type[Method], *args: Any, **kwargs: Any) -> Method:
        self = super().__new__(cls)
        self._live = {}
        return self

    def compute(self, objective: Objective, batch: tuple[Any, Any, Any]) -> tuple[Gradients, Any]:
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
        """Returns the arguments of `__init__`, from the attributes of the same names."""
        config = {name: getattr(self, name) for name in self._arguments()}
        return {
            name: keras.saving.serialize_keras_object(value) if callable(value) else value
            for name, value in config.items()
        }

    @classmethod
    def _arguments(cls) -> list[str]:
        if cls.__init__ is object.__init__:
            return []
        return list(inspect.signature(cls.__init__).parameters)[1:]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GradientMethod:
        """Returns the method that a config describes."""
        return cls(
            **{
                name: keras.saving.deserialize_keras_object(value)
                if isinstance(value, dict)
                else value
                for name, value in config.items()
            }
        )


class LiveNumber:
    """A number of a `GradientMethod` that may be assigned while the model trains.

    It lives in a variable too, so assigning another one needs no retrace.

    Args:
        minimum: the smallest value allowed, itself included, or `None`.
        above: a bound that values must exceed, or `None`.
    """

    def __init__(self, *, minimum: float | None = None, above: float | None = None) -> None:
        self._minimum = minimum
        self._above = above

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, method: Any, owner: type | None = None) -> Any:
        return self if method is None else method.__dict__[self._name]

    def __set__(self, method: Any, value: Any) -> None:
        text = f"Received: {self._name}={value!r}."
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"`{self._name}` must be a number. {text}")
        if not math.isfinite(value):
            raise ValueError(f"`{self._name}` must be finite. {text}")
        if self._above is not None and not float(value) > self._above:
            raise ValueError(f"`{self._name}` must be a positive number. {text}")
        if self._minimum is not None and not float(value) >= self._minimum:
            raise ValueError(f"`{self._name}` must be zero or a positive number. {text}")
        method.__dict__[self._name] = value
        if self._name in method._live:
            method._live[self._name].assign(float(value))
        else:
            method._live[self._name] = tf.Variable(float(value), trainable=False)

    @staticmethod
    def of(method: Any, name: str) -> tf.Tensor:
        """Returns a number of a method as it is at this step, a scalar float32."""
        return tf.convert_to_tensor(method._live[name])


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
