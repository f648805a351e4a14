"""What a model's loss is made of, and what each term was divided by.

Keras gives the sum of all terms, each divided by the elements of the batch it saw. Where
a batch comes in parts (replicas, micro-batches, accumulated steps), a term counts by its
own divisor; see `Quotient`.

Private names used here: `keras.src.losses.loss` with `reduce_weighted_values`,
`apply_mask`, `squeeze_or_expand_to_same_rank`, `scale_loss_for_distribution` and
`unscale_loss_for_distribution`,
`Model._compile_loss`, `_compute_loss`, `_symbolic_build`, `_aggregate_additional_loss`,
`CompileLoss._flat_losses` and its `_replace`. Checked with Keras 3.15.1;
`tests/models/test_private_names.py` fails when they change.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import tensorflow as tf
from keras.src.losses import loss as keras_losses

from keras_tapefit.backward.base import Batch, Quotient, sum_of
from keras_tapefit.training import keras_trainer


class Term(NamedTuple):
    """One compiled loss of a part of a batch.

    Attributes:
        place: among the compiled losses.
        value: scalar, as Keras logs it.
        weight: of `loss_weights`, or `None`.
        divisor: scalar float32, what the loss was divided by; `None`: by nothing.
        kind: equal for terms whose divisors have the same ratios in all parts.
    """

    place: int
    value: tf.Tensor
    weight: Any
    divisor: tf.Tensor | None
    kind: Any

    @property
    def weighted(self) -> tf.Tensor:
        """What the term adds to the loss."""
        return self.value if self.weight is None else self.value * self.weight


EXAMPLES = "examples"


def quotients(
    model: Any, batch: Batch, y_pred: Any, training: bool, examples: tf.Tensor, apart: bool
) -> list[Quotient]:
    """Computes the loss of a part of a batch, as `compute_loss` does.

    Args:
        model: the model.
        batch: `(x, y, sample_weight)`.
        y_pred: the outputs.
        training: passed to `compute_loss`.
        examples: the number of examples, a scalar float32.
        apart: whether the part is combined with others later. If not, there is one
            quotient, whose loss is Keras's own.

    Returns:
        The quotients; a loss that the user computes is a mean over examples.
    """
    if not apart or overrides_compute_loss(model) or model._compile_loss is None:
        return [Quotient(compute(model, batch, y_pred, training), examples)]
    _, terms = separate(model, batch, y_pred, training)
    rest = additional(model)
    kinds = dict.fromkeys([*(term.kind for term in terms), *([EXAMPLES] if rest else [])])
    found = []
    for kind in kinds:
        members = [term for term in terms if term.kind == kind]
        losses = [term.weighted for term in members]
        losses += rest if kind == EXAMPLES else []
        divisor = examples if kind == EXAMPLES else members[0].divisor
        terms_here = {term.place: term.value for term in members}
        found.append(Quotient(sum_of(losses), divisor, terms_here))
    return found


def compute(model: Any, batch: Batch, y_pred: Any, training: bool) -> tf.Tensor:
    """Calls `compute_loss`, of the signature with or without `training`."""
    x, y, sample_weight = batch
    return _scalar(
        model._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=training)
    )


def _scalar(loss: tf.Tensor) -> tf.Tensor:
    # Of no example, or without a reduction, Keras gives the losses themselves.
    return loss if loss.shape.rank == 0 else tf.reduce_sum(loss)


def build(model: Any, batch: Batch) -> None:
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


def build_missing(model: Any, batch: Batch) -> None:
    """Has a model look up what its losses are, where it has any and does not know."""
    if model._compile_loss is not None and not model._compile_loss.built:
        build(model, batch)


def separate(model: Any, batch: Batch, y_pred: Any, training: bool) -> tuple[tf.Tensor, list[Term]]:
    """Computes the compiled losses, and listens to each of them.

    Returns:
        The loss, that of `compute_loss` where the model has its own, and the compiled
        terms; the logs of the terms are left to the caller.
    """
    compiled = model._compile_loss
    if not compiled.built:
        # Its list of losses is made by the first call, which leaves no other trace.
        with keras.StatelessScope():
            compiled(batch[1], y_pred, batch[2])
    with hearing(model) as heard, _silent(compiled):
        if overrides_compute_loss(model):
            total = compute(model, batch, y_pred, training)
        else:
            total = compiled(batch[1], y_pred, batch[2])
    examples = batch_shape(batch[0])
    terms = []
    for place, (item, (value, reduced)) in enumerate(
        zip(compiled._flat_losses, heard, strict=False)
    ):
        divisor, kind = _divisor(item.loss.reduction, reduced, examples, place)
        value = tf.cast(_scalar(value), compiled.dtype)
        terms.append(Term(place, value, item.loss_weights, divisor, kind))
    return total, terms


def listen(model: Any) -> None:
    """Has the compiled losses of a model tell what they give, where they are known."""
    compiled = model._compile_loss
    if compiled is not None and compiled.built:
        compiled._flat_losses[:] = [
            item if isinstance(item.loss, _Listened) else item._replace(loss=_Listened(item.loss))
            for item in compiled._flat_losses
        ]


@contextlib.contextmanager
def hearing(model: Any) -> Iterator[list[Any]]:
    """Yields a list that takes up what each compiled loss gives in this context."""
    listen(model)
    before, _state.heard = _state.heard, []
    heard = _state.heard
    try:
        yield heard
    finally:
        _state.heard = before
        if before is not None:
            before.extend(heard)


def of_examples(model: Any, heard: list[Any]) -> tuple[tf.Tensor | None, str | None]:
    """Returns the compiled loss of each example, as that of a batch of one.

    Args:
        model: the model.
        heard: what its losses gave for a batch; see `hearing`.

    Returns:
        The losses, of shape `[batch]`; or else why they are not known.
    """
    compiled = model._compile_loss
    if compiled is None or overrides_compute_loss(model):
        return None, "the loss is computed in a way of the model's own"
    if not compiled.built or len(heard) != len(compiled._flat_losses):
        return None, "its losses cannot be told apart"
    found = []
    for item, (_, reduced) in zip(compiled._flat_losses, heard, strict=True):
        loss = getattr(item.loss, "loss", item.loss)
        if not _is_by_example(loss) or reduced is None or not reduced.values.shape.rank:
            return None, f"the loss {getattr(loss, 'name', loss)!r} may mix examples"
        if any(_is_wider(v, reduced.values) for v in (reduced.mask, reduced.sample_weight)):
            return None, "a mask, or weights, have more axes than the loss, which Keras mixes"
        each = tf.cast(_each(reduced, loss.reduction), compiled.dtype)
        found.append(each if item.loss_weights is None else each * item.loss_weights)
    return sum_of(found), None


def _is_by_example(loss: Any) -> bool:
    """Whether a loss is one of Keras's that computes examples apart from each other."""
    what = getattr(loss, "fn", type(loss))
    name = getattr(what, "__name__", "").lower()
    of_keras = getattr(what, "__module__", "").startswith("keras.src.losses")
    return of_keras and name not in ("circle", "dice", "tversky")


def _is_wider(value: Any, losses: tf.Tensor) -> bool:
    """Whether a mask has an axis that losses have not; by one of size 1 nothing is mixed."""
    if value is None:
        return False
    shape = tf.convert_to_tensor(value).shape
    return shape.rank > losses.shape.rank and shape[-1] != 1


def _each(reduced: _Reduced, reduction: Any) -> tf.Tensor:
    """Reduces the values of each example as Keras reduces those of a batch of one."""
    values = tf.convert_to_tensor(reduced.values)
    values = values if reduced.dtype is None else tf.cast(values, reduced.dtype)
    weight, mask = (
        None if v is None else tf.cast(v, values.dtype)
        for v in (reduced.sample_weight, reduced.mask)
    )
    if mask is not None:
        if reduction in ("mean", "sum_over_batch_size"):
            mask = tf.cast(mask != 0, values.dtype)
            ones = _over_examples(tf.ones_like(mask))
            share = tf.math.divide_no_nan(ones, _over_examples(mask))
            mask *= tf.reshape(share, [-1] + [1] * (mask.shape.rank - 1))
        if weight is not None:
            mask, weight = keras_losses.squeeze_or_expand_to_same_rank(mask, weight)
            mask *= weight
        weight = mask
    if weight is not None:
        values, weight = keras_losses.squeeze_or_expand_to_same_rank(values, weight)
        values *= weight
    total = _over_examples(values)
    if reduction in (None, "none", "sum"):
        return total
    if reduction == "mean_with_sample_weight" and weight is not None:
        return tf.math.divide_no_nan(total, _over_examples(weight))
    return tf.math.divide_no_nan(total, _over_examples(tf.ones_like(values)))


def _over_examples(values: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(values, axis=list(range(1, values.shape.rank)))


def additional(model: Any) -> list[tf.Tensor]:
    """Returns what comes to the loss besides the compiled ones, one scalar each."""
    return [model._aggregate_additional_loss(loss) for loss in model.losses]


def overrides_compute_loss(model: Any) -> bool:
    """Whether the loss is computed in a way of the model's own."""
    return keras_trainer.overrides(model, "compute_loss")


def track_terms(model: Any, terms: dict[int, tf.Tensor], y_pred: Any, num_replicas: int) -> None:
    """Adds each compiled loss of a whole batch to its epoch mean, as Keras does.

    Args:
        model: the model.
        terms: this replica's share of each.
        y_pred: the outputs, whose static size is the weight.
        num_replicas: whose shares add up.
    """
    compiled = model._compile_loss
    metrics = [] if compiled is None else compiled.metrics
    if not terms or not metrics:
        return
    for place, metric in enumerate(metrics):
        size = _size_of_output(compiled._flat_losses[place].path, y_pred)
        metric.update_state(terms[place] * num_replicas, sample_weight=size)


def _size_of_output(path: Any, y_pred: Any) -> int | None:
    try:
        for key in path:
            y_pred = y_pred[key]
    except (KeyError, TypeError, IndexError):
        pass
    return keras.tree.flatten(y_pred)[0].shape[0]


def batch_shape(x: Any) -> tf.Tensor:
    """Returns the number of examples in a part of a batch, a scalar float32."""
    first = keras_trainer.first_array(x)
    if first is None:
        return tf.constant(1.0)
    if isinstance(first, tf.SparseTensor | tf.RaggedTensor):
        return tf.cast(tf.shape(first, tf.int64)[0], tf.float32)
    known = tf.convert_to_tensor(first).shape
    if known.rank == 0:
        return tf.constant(1.0)
    if known[0] is not None:
        return tf.constant(float(known[0]))
    return tf.cast(tf.shape(first)[0], tf.float32)


class _Reduced(NamedTuple):
    """What Keras reduced to a loss: arguments of `reduce_weighted_values`."""

    values: Any
    sample_weight: Any
    mask: Any
    dtype: Any


def _divisor(
    reduction: Any, reduced: _Reduced | None, examples: tf.Tensor, place: int
) -> tuple[tf.Tensor | None, Any]:
    """Returns what a loss was divided by, and which other losses are divided alike."""
    if reduction in (None, "none", "sum"):
        return None, "sum"
    if reduced is None or reduced.values.shape.rank == 0:
        # A loss that reduces by itself: a mean over examples.
        return examples, EXAMPLES
    values, weight, mask = reduced.values, reduced.sample_weight, reduced.mask
    weighted = reduction == "mean_with_sample_weight" and weight is not None
    if mask is None and not weighted:
        inner = values.shape[1:]
        if inner.is_fully_defined():
            # As many elements in each example.
            return examples, EXAMPLES
        return tf.cast(tf.size(values), tf.float32), ("elements", place)
    if reduction == "mean_with_sample_weight":
        total = keras_losses.apply_mask(
            None if weight is None else tf.cast(weight, values.dtype),
            None if mask is None else tf.cast(mask, values.dtype),
            dtype=values.dtype,
            reduction=reduction,
        )
        return tf.reduce_sum(tf.cast(total, tf.float32)), ("weight", id(weight), id(mask))
    unmasked = tf.reduce_sum(tf.cast(mask, tf.float32))
    return unmasked, ("mask", id(mask))


class _Listened:
    """A loss that lets its caller's thread know what it gave.

    Args:
        loss: the loss.
    """

    def __init__(self, loss: Any) -> None:
        self.loss = loss

    @property
    def reduction(self) -> Any:
        return getattr(self.loss, "reduction", "sum_over_batch_size")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _state.heard is None:
            return self.loss(*args, **kwargs)
        _state.reduced = None
        value = self.loss(*args, **kwargs)
        # The last one: a loss may call others, whose values it then reduces itself.
        ours = type(self.loss).__call__ is keras.losses.Loss.__call__
        _state.heard.append((value, _state.reduced if ours else None))
        return value


class _State(threading.local):
    heard: list[Any] | None = None
    reduced: _Reduced | None = None
    silent: bool = False
    undivided: bool = False


_state = _State()


@contextlib.contextmanager
def undivided() -> Iterator[None]:
    """Has Keras leave losses as they are on several replicas, of this thread.

    Keras divides a mean by the number of replicas, and some losses not at all. Here each
    replica's loss is multiplied by its share, whatever it was computed by.
    """
    before, _state.undivided = _state.undivided, True
    try:
        yield
    finally:
        _state.undivided = before


@contextlib.contextmanager
def _silent(compiled: Any) -> Iterator[None]:
    """Has the logs of single losses left alone, which see a part of a batch here."""
    for metric in compiled.metrics:
        if not isinstance(metric.__dict__.get("update_state"), _UpdateState):
            # Past Keras's attribute tracking.
            metric.__dict__["update_state"] = _UpdateState(metric)
    before, _state.silent = _state.silent, True
    try:
        yield
    finally:
        _state.silent = before


class _UpdateState:
    """The `update_state` of a metric, but for threads that have asked for silence."""

    def __init__(self, metric: Any) -> None:
        self._metric = metric

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _state.silent:
            return None
        return type(self._metric).update_state(self._metric, *args, **kwargs)


def _unless_undivided(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def for_distribution(value: Any) -> Any:
        return value if _state.undivided else original(value)

    return for_distribution


def _listened_to(original: Callable[..., Any]) -> Callable[..., Any]:
    def reduce_weighted_values(
        values: Any,
        sample_weight: Any = None,
        mask: Any = None,
        reduction: Any = "sum_over_batch_size",
        dtype: Any = None,
    ) -> Any:
        if _state.heard is not None:
            tensor = tf.convert_to_tensor(values)
            _state.reduced = _Reduced(tensor, sample_weight, mask, dtype)
        return original(values, sample_weight, mask, reduction, dtype)

    return reduce_weighted_values


def _install() -> None:
    """Puts the three functions in place of Keras's; each does the same unless asked."""
    keras_losses.reduce_weighted_values = _listened_to(keras_losses.reduce_weighted_values)
    for name in ("scale_loss_for_distribution", "unscale_loss_for_distribution"):
        setattr(keras_losses, name, _unless_undivided(getattr(keras_losses, name)))


_install()
