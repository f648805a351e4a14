"""What every way to get gradients has in common."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, TypeVar

import keras
import tensorflow as tf

from keras_tapefit.backward.taps import Taps
from keras_tapefit.gradients import Gradients

Batch = tuple[Any, Any, Any]
"""`(x, y, sample_weight)`."""


@dataclass
class Quotient:
    """The terms of a loss that are divided by one number: a sum over elements by their count.

    A loss is a sum of quotients. Where parts of a batch are put together, each quotient
    counts by its divisor; see `combined`.

    Attributes:
        loss: this replica's share of the quotient, a scalar without loss scale; `None`
            where only gradients are known.
        divisor: what the quotient of all replicas was divided by, a scalar float32.
            `None`: by nothing, so that parts add up.
        terms: by its place among the compiled losses, this replica's share of each of
            them that is in the quotient, without `loss_weights`.
        gradients: this replica's share, times the loss scale.
        weight: by what the gradients have been multiplied besides, the part of a batch
            that this is; `None`: by nothing.
    """

    loss: tf.Tensor | None
    divisor: tf.Tensor | None
    terms: dict[int, tf.Tensor] = field(default_factory=dict)
    gradients: Gradients | None = None
    weight: tf.Tensor | None = None

    @property
    def _is_sum(self) -> bool:
        return self.divisor is None

    @property
    def adds_up(self) -> bool:
        """Whether the gradients of a batch are the sum of those of its parts."""
        return self._is_sum or self.weight is not None

    def scaled_by(self, factor: Any) -> Quotient:
        """Returns the quotient with its gradients multiplied by a scalar."""
        assert self.gradients is not None
        return replace(self, gradients=self.gradients.scale(factor))

    @staticmethod
    def combined(parts: Sequence[Quotient]) -> Quotient:
        """Returns the quotient of a batch, given those of its parts."""
        if len(parts) == 1:
            return parts[0]
        first = parts[0]
        if first._is_sum:
            shares: list[Any] = [None] * len(parts)
            divisor = None
        else:
            divisors = [part.divisor for part in parts]
            divisor = tf.add_n(divisors)
            # Where nothing counts, nothing is there to be divided.
            shares = [tf.math.divide_no_nan(d, divisor) for d in divisors]

        def total(values: Sequence[Any]) -> tf.Tensor:
            return tf.add_n([part_of(v, s) for v, s in zip(values, shares, strict=True)])

        terms = {place: total([part.terms[place] for part in parts]) for place in first.terms}
        return Quotient(total([part.loss for part in parts]), divisor, terms)


@dataclass
class Forward:
    """What the forward pass of a part of a batch gives.

    Attributes:
        quotients: of the loss; one, where parts need not be put together afterwards.
        scaled: the loss of each quotient times the loss scale, to be differentiated.
        shares: by what this replica's losses were multiplied, one for each quotient.
        outputs: of the model.
        examples: the number of this replica's examples, a scalar float32.
        all_examples: the number of those of all replicas.
        counts: scalar bool, whether there is an example; `None`: there surely is.
        taps: what layers returned, where somebody asked for it.
    """

    quotients: list[Quotient]
    scaled: list[tf.Tensor]
    shares: list[Any]
    outputs: Any
    examples: tf.Tensor
    all_examples: tf.Tensor
    counts: tf.Tensor | None = None
    taps: Taps | None = None

    @property
    def loss(self) -> tf.Tensor:
        """This replica's share of the loss, without loss scale."""
        return sum_of([q.loss for q in self.quotients if q.loss is not None])

    def computed(self, gradients: Sequence[Sequence[Any]], variables: Sequence[Any]) -> Computed:
        """Returns what a method returns, given the gradients of each of `scaled`."""
        quotients = []
        for quotient, found in zip(self.quotients, gradients, strict=True):
            pairs = Gradients(zip(found, variables, strict=True))
            pairs = pairs if self.counts is None else pairs.where(self.counts)
            quotients.append(replace(quotient, gradients=pairs))
        taps = [] if self.taps is None else [self.taps]
        return Computed(quotients, self.outputs, self.examples, self.all_examples, taps=taps)


@dataclass
class Computed:
    """What a `GradientMethod` knows of a batch when it is done.

    Attributes:
        quotients: of the loss, each with its gradients.
        outputs: of the forward pass that counts for the metrics.
        examples: the number of this replica's examples, a scalar float32.
        all_examples: the number of those of all replicas.
        norms: the norm of the gradient of each part of the batch, of shape
            `[num_parts]`, times the loss scale; `None`: the batch was not divided.
        sizes: the number of examples in each part.
        taps: what layers returned in each part, where somebody asked for it.
        logged: what the method logs: by name the mean of all replicas, and for how many
            examples it counts.
    """

    quotients: list[Quotient]
    outputs: Any
    examples: tf.Tensor
    all_examples: tf.Tensor
    norms: tf.Tensor | None = None
    sizes: tf.Tensor | None = None
    taps: list[Taps] = field(default_factory=list)
    logged: dict[str, tuple[tf.Tensor, tf.Tensor]] = field(default_factory=dict)

    @property
    def loss(self) -> tf.Tensor | None:
        """This replica's share of the loss, without loss scale; `None`: unknown."""
        losses = [quotient.loss for quotient in self.quotients if quotient.loss is not None]
        return sum_of(losses) if losses else None

    def part_norms(self, num_replicas: int) -> tuple[tf.Tensor, tf.Tensor] | None:
        """Returns the norms and sizes of the parts of the batch of all replicas.

        `None`: the batch was not divided.
        """
        if self.norms is not None and self.sizes is not None:
            return self.norms, self.sizes
        if num_replicas == 1:
            return None
        norm = tf.cast(self.gradients.global_norm(), tf.float32)
        # As if this replica's part were alone.
        norm *= tf.math.divide_no_nan(self.all_examples, self.examples)
        return tf.reshape(norm, [1]), tf.reshape(self.examples, [1])

    @property
    def gradients(self) -> Gradients:
        """This replica's share of the gradients of the loss, times the loss scale."""
        found = [q.gradients for q in self.quotients if q.gradients is not None]
        return functools.reduce(Gradients.plus, found)

    @property
    def terms(self) -> dict[int, tf.Tensor]:
        """This replica's share of each compiled loss, without `loss_weights`."""
        return {place: value for q in self.quotients for place, value in q.terms.items()}


def sum_of(values: Sequence[tf.Tensor]) -> tf.Tensor:
    """Returns the sum of some scalars; of a single one that one itself."""
    return values[0] if len(values) == 1 else tf.add_n(list(values))


def part_of(value: tf.Tensor, share: Any) -> tf.Tensor:
    """Returns a share of a loss, `None` for all of it, in float32 at least."""
    value = tf.cast(value, tf.float32) if value.dtype.size < 4 else value
    # A part without an example has a loss that is no number.
    return value if share is None else tf.math.multiply_no_nan(value, tf.cast(share, value.dtype))


class Objective(Protocol):
    """The loss of a model on a batch, as a way to get gradients sees it."""

    def tape(self, persistent: bool = False) -> tf.GradientTape:
        """Returns a tape that watches the variables being trained."""

    def forward(self, batch: Batch) -> Forward:
        """Runs the forward pass, in training mode, and the loss."""

    def of_parts(self, size: Any) -> Objective:
        """Returns the loss on parts of a batch, whose gradients add up to its gradient.

        That is so for what is divided by the number of examples, where no replica and no
        hook sees a part by itself; see `Quotient.weight`.

        Args:
            size: the number of examples in the batch, an integer or a scalar tensor.
        """

    def by_example(
        self, batch: Batch, around: Callable[[], AbstractContextManager[Any]]
    ) -> tuple[Forward, tf.Tensor | None, str | None]:
        """Runs the forward pass, in training mode, and the loss of each example.

        Args:
            batch: `(x, y, sample_weight)`.
            around: makes a context for the call of the model.

        Returns:
            What `forward` gives; the loss of each example as that of a batch of one, of
            shape `[batch]`, without loss scale and regularization; and, where that is
            `None`, why it is not known.
        """

    def first_axes(self, batch: Batch, calls: Any, size: int) -> set[int | None]:
        """Returns the sizes of the first axes in the calls of layers, for a batch of a size.

        With `None` in it where that is not known, or other layers are called then.

        Args:
            batch: `(x, y, sample_weight)`, of which shapes and types are used.
            calls: the `WeightCalls` of a forward pass.
            size: the number of examples.
        """

    def regularization(self) -> list[Any]:
        """Returns the gradient of the weights' regularization, by `variables()`."""

    def tasks(self, batch: Batch, tasks: Any = None) -> tuple[list[Any], Any, Forward]:
        """Runs the forward pass, in training mode, and each loss separately.

        Args:
            batch: `(x, y, sample_weight)`.
            tasks: a function of the targets and the outputs that returns a list of
                scalars. `None`: the losses that the model is compiled with.

        Returns:
            The scalar losses, weights of `compile` included; what comes to the loss
            besides them, such as regularization, or `None`; both times the loss scale;
            and what the forward pass gave, with one quotient.
        """

    def state(self) -> Any:
        """Returns what a forward pass may change, as it is now: seeds, statistics."""

    def gradients_at(
        self,
        batch: Batch,
        values: list[Any] | None = None,
        state: Any = None,
        example: Any = None,
        like: Forward | None = None,
    ) -> tuple[tf.Tensor, list[list[Any]]]:
        """Runs a forward and a backward pass that leave nothing behind.

        To be asked after a forward pass that counts.

        Args:
            batch: `(x, y, sample_weight)`.
            values: the values of `variables()` in these passes; `None`: as they are.
            state: what the passes begin with, as `state()` gave it. That of before the
                pass that counts repeats that pass: the same dropout, say.
            example: a scalar integer; passes with different ones draw different random
                numbers.
            like: the pass that counts, whose quotients and shares are used; `None`: one
                quotient, of a batch that is this replica's alone.

        Returns:
            The scalar loss, times the loss scale, and for each quotient its gradients
            by `variables()`.
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

    def part(self, batch: Batch, start: Any, stop: Any, size: int | None = None) -> Batch:
        """Returns the examples of a batch from `start` to `stop`.

        Args:
            batch: `(x, y, sample_weight)`.
            start: the first of them, an integer or a scalar tensor.
            stop: the one after the last.
            size: their number, where it is known.
        """

    def may_loop(self) -> bool:
        """Whether parts may be computed in a loop of TensorFlow."""

    def masks(self, outputs: Any) -> list[Any]:
        """Returns the mask of each output, flat, `None` where there is none."""

    def set_masks(self, outputs: Any, masks: list[Any]) -> None:
        """Gives each output its mask."""


Method = TypeVar("Method", bound="GradientMethod")


class GradientMethod:
    """Base class of the ways to get gradients: `compile(backward=...)`.

    Subclasses implement `compute`. Where the gradient of a batch is not the mean of
    those of its parts, a subclass sets `takes_parts = False`; where the gradients at layer
    outputs are not those of the batch, `has_outputs = False`.
    """

    takes_parts: ClassVar[bool] = True
    has_outputs: ClassVar[bool] = True
    _live: dict[str, tf.Variable]

    def __new__(cls: type[Method], *args: Any, **kwargs: Any) -> Method:
        self = super().__new__(cls)
        self._live = {}
        return self

    def compute(self, objective: Objective, batch: Batch) -> Computed:
        """Returns the gradients of the loss on a batch, and all else that is known of it.

        Args:
            objective: the loss of the model.
            batch: `(x, y, sample_weight)`.
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
    is_class = isinstance(value, type) and issubclass(value, GradientMethod)
    example = value.__name__ if is_class else "Backpropagation"
    raise TypeError(
        "`backward` must be one of `keras_tapefit.backward`, such as "
        f"`backward.{example}(...)`. Received: {value!r} (of type "
        f"{type(value).__name__})."
    )


register = keras.saving.register_keras_serializable("keras_tapefit")
