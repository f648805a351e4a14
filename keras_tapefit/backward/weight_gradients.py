"""Gradients of weights example by example, from inputs and output gradients alone.

The gradient of a weight is a product of what a layer got and what came back to its output,
summed over the places of an example. Its norm needs that sum only where it is small, and a
weighted sum over examples never does.

References: Goodfellow, 2015, "Efficient per-example gradient computations",
arXiv:1510.01799; Lee and Kifer, 2021, "Scaling up differentially private deep learning with
fast per-example gradient clipping", PETS; Li et al., 2022, "Large language models can be
strong differentially private learners", arXiv:2110.05679; Bu et al., 2022, "Scalable and
efficient training of large convolutional neural networks with differential privacy",
arXiv:2205.10683.
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import keras
import tensorflow as tf

from keras_tapefit.gradients.norms import rows_norm, wide

Calls = Sequence[tuple[tf.Tensor, tf.Tensor]]
"""For each call of a layer its input and the gradient at its output, before activation."""


class WeightGradient(Protocol):
    """The gradients of one weight, of each example."""

    def squares(self) -> tf.Tensor:
        """Returns the square norm of each, of shape `[batch]`; out of range it is anything."""

    def norms(self) -> tf.Tensor:
        """Returns the norm of each, float64, whatever its size."""

    def products(self, other: tf.Tensor) -> tf.Tensor:
        """Returns the scalar product of each with a tensor of the weight's shape."""

    def total(self, shares: tf.Tensor, kept: tf.Tensor | None) -> tf.Tensor:
        """Returns their sum, each times its share.

        Those not kept may be NaN, and count 0; `None`: all are kept.
        """


class Whole:
    """Gradients that are there, one tensor an example.

    Args:
        parts: of shapes `[batch, ...]`, which one after the other are the weight.
        shape: of the weight.
    """

    def __init__(self, parts: Sequence[tf.Tensor], shape: Sequence[int]) -> None:
        self._parts = list(parts)
        self._shape = list(shape)

    def squares(self) -> tf.Tensor:
        return tf.add_n([_square_of_rows(part) for part in self._parts])

    def norms(self) -> tf.Tensor:
        return tf.cast(rows_norm([_flat(part) for part in self._parts]), tf.float64)

    def products(self, other: tf.Tensor) -> tf.Tensor:
        pieces = tf.split(tf.reshape(other, [-1]), [math.prod(p.shape[1:]) for p in self._parts])
        found = [
            tf.linalg.matvec(_flat(part), tf.cast(piece, part.dtype))
            for part, piece in zip(self._parts, pieces, strict=True)
        ]
        return tf.cast(tf.add_n(found), tf.float64)

    def total(self, shares: tf.Tensor, kept: tf.Tensor | None) -> tf.Tensor:
        sums = [
            tf.tensordot(tf.cast(shares, part.dtype), cleaned(part, kept), 1)
            for part in self._parts
        ]
        whole = sums[0] if len(sums) == 1 else tf.stack(sums)
        return tf.reshape(whole, self._shape)


class Product:
    """The product of a layer's inputs and output gradients, summed over places.

    Args:
        inputs: of shape `[batch, places, p]`.
        gradients: of shape `[batch, places, q]`.
        to_weight: makes a tensor of the weight's shape of one of shape `[p, q]`.
        from_weight: the other way round.
    """

    def __init__(
        self,
        inputs: tf.Tensor,
        gradients: tf.Tensor,
        to_weight: Callable[[tf.Tensor], tf.Tensor],
        from_weight: Callable[[tf.Tensor], tf.Tensor],
    ) -> None:
        self._inputs, self._gradients = inputs, gradients
        self._to_weight, self._from_weight = to_weight, from_weight

    def squares(self) -> tf.Tensor:
        if self._inputs.shape[1] == 1:
            return _square_of_rows(self._inputs) * _square_of_rows(self._gradients)
        return self._square_of_gram(self._inputs, self._gradients)

    def norms(self) -> tf.Tensor:
        if self._inputs.shape[1] == 1:
            lengths = [rows_norm([_flat(v)]) for v in (self._inputs, self._gradients)]
            return tf.cast(lengths[0], tf.float64) * tf.cast(lengths[1], tf.float64)
        return _of_size_one(self._square_of_gram, self._inputs, self._gradients)

    @staticmethod
    def _square_of_gram(inputs: tf.Tensor, gradients: tf.Tensor) -> tf.Tensor:
        gram = tf.matmul(inputs, inputs, transpose_b=True)
        gram *= tf.matmul(gradients, gradients, transpose_b=True)
        return tf.reduce_sum(gram, axis=[1, 2])

    def products(self, other: tf.Tensor) -> tf.Tensor:
        matrix = tf.cast(self._from_weight(other), self._inputs.dtype)
        rows = tf.matmul(tf.reshape(self._inputs, [-1, self._inputs.shape[-1]]), matrix)
        rows *= tf.reshape(self._gradients, [-1, self._gradients.shape[-1]])
        return tf.cast(
            tf.reduce_sum(tf.reshape(rows, tf.shape(self._gradients)), [1, 2]), "float64"
        )

    def total(self, shares: tf.Tensor, kept: tf.Tensor | None) -> tf.Tensor:
        inputs, gradients = cleaned(self._inputs, kept), cleaned(self._gradients, kept)
        gradients *= tf.cast(shares, gradients.dtype)[:, None, None]
        left = tf.reshape(inputs, [-1, inputs.shape[-1]])
        right = tf.reshape(gradients, [-1, gradients.shape[-1]])
        return self._to_weight(tf.matmul(left, right, transpose_a=True))


class Rows:
    """Gradients of the rows of a table that were looked up.

    Args:
        ids: of shape `[batch, places]`.
        gradients: of shape `[batch, places, width]`.
        num_rows: of the table.
    """

    def __init__(self, ids: tf.Tensor, gradients: tf.Tensor, num_rows: int) -> None:
        self._ids, self._gradients, self._num_rows = ids, gradients, num_rows

    def squares(self) -> tf.Tensor:
        return self._square(self._same(), self._gradients)

    def norms(self) -> tf.Tensor:
        return _of_size_one(self._square, self._same(), self._gradients)

    def _same(self) -> tf.Tensor:
        return tf.cast(self._ids[:, :, None] == self._ids[:, None, :], self._gradients.dtype)

    @staticmethod
    def _square(same: tf.Tensor, gradients: tf.Tensor) -> tf.Tensor:
        products = tf.matmul(gradients, gradients, transpose_b=True)
        return tf.reduce_sum(products * same, axis=[1, 2])

    def products(self, other: tf.Tensor) -> tf.Tensor:
        rows = tf.cast(tf.gather(other, self._ids), self._gradients.dtype)
        return tf.cast(tf.reduce_sum(rows * self._gradients, axis=[1, 2]), tf.float64)

    def total(self, shares: tf.Tensor, kept: tf.Tensor | None) -> tf.Tensor:
        gradients = cleaned(self._gradients, kept)
        gradients *= tf.cast(shares, gradients.dtype)[:, None, None]
        rows = tf.reshape(gradients, [-1, gradients.shape[-1]])
        return tf.math.unsorted_segment_sum(rows, tf.reshape(self._ids, [-1]), self._num_rows)


def cleaned(value: tf.Tensor, kept: tf.Tensor | None) -> tf.Tensor:
    """Returns a tensor with zeros for the examples that are not kept: 0 · NaN is NaN."""
    if kept is None:
        return value
    rows = tf.reshape(kept, [-1] + [1] * (value.shape.rank - 1))
    return tf.where(rows, value, tf.zeros_like(value))


def _square_of_rows(value: tf.Tensor) -> tf.Tensor:
    return tf.reduce_sum(tf.square(value), axis=list(range(1, value.shape.rank)))


def _flat(value: tf.Tensor) -> tf.Tensor:
    return tf.reshape(value, [tf.shape(value)[0], math.prod(value.shape[1:])])


def _of_size_one(
    square: Callable[[tf.Tensor, tf.Tensor], tf.Tensor], a: tf.Tensor, b: tf.Tensor
) -> tf.Tensor:
    """Returns the root of a form of degree two in each of two tensors, brought to size one."""
    sizes = [_largest(v) for v in (a, b)]
    value = square(a / sizes[0], b / sizes[1])
    factors = [tf.cast(tf.reshape(size, [-1]), tf.float64) for size in sizes]
    # Rounding may leave a little less than 0.
    value = tf.where(value < 0, tf.zeros_like(value), value)
    return tf.sqrt(tf.cast(value, tf.float64)) * factors[0] * factors[1]


def _largest(value: tf.Tensor) -> tf.Tensor:
    """Returns the largest size in each example, 1 for one without any."""
    axes = list(range(1, value.shape.rank))
    size = tf.reduce_max(tf.abs(value), axis=axes, keepdims=True)
    return tf.where((size > 0) & tf.math.is_finite(size), size, tf.ones_like(size))


def _same(value: tf.Tensor) -> tf.Tensor:
    return value


def _product(
    a: tf.Tensor, g: tf.Tensor, to_weight: Any = _same, from_weight: Any = _same
) -> WeightGradient:
    """Returns the product of `[batch, places, p]` and `[batch, places, q]`, in the form that
    costs less."""
    places, p, q = a.shape[1], a.shape[2], g.shape[2]
    if places == 1 or (places is not None and p * q > places * (p + q)):
        return Product(a, g, to_weight, from_weight)
    whole = Whole([tf.matmul(a, g, transpose_a=True)], [p, q])
    return _Turned(whole, to_weight, from_weight)


class _Turned:
    """A gradient whose weight has its axes in another order."""

    def __init__(self, inner: Any, to_weight: Any, from_weight: Any) -> None:
        self._inner, self._to_weight, self._from_weight = inner, to_weight, from_weight

    def squares(self) -> tf.Tensor:
        return self._inner.squares()

    def norms(self) -> tf.Tensor:
        return self._inner.norms()

    def products(self, other: tf.Tensor) -> tf.Tensor:
        return self._inner.products(self._from_weight(other))

    def total(self, shares: tf.Tensor, kept: tf.Tensor | None) -> tf.Tensor:
        return self._to_weight(self._inner.total(shares, kept))


def _joined(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    return tensors[0] if len(tensors) == 1 else tf.concat(tensors, axis=1)


def _places(value: tf.Tensor) -> tf.Tensor:
    """Returns `[batch, ..., n]` as `[batch, places, n]`."""
    inner = value.shape[1:-1]
    places = math.prod(inner) if inner.is_fully_defined() else -1
    return tf.reshape(wide(value), [tf.shape(value)[0], places, value.shape[-1]])


def _summed(gradient: tf.Tensor, shape: Sequence[int]) -> tf.Tensor:
    """Returns `[batch, ...]` summed over the axes along which a weight was stretched."""
    gradient = wide(gradient)
    shape = [1] * (gradient.shape.rank - 1 - len(shape)) + list(shape)
    axes = [i + 1 for i, n in enumerate(shape) if n == 1]
    return tf.reduce_sum(gradient, axes) if axes else gradient


def _of_bias(calls: Calls, bias: Any) -> Whole:
    shape = [int(n) for n in bias.shape]
    sums = [_summed(g, shape) for _, g in calls]
    return Whole([tf.reshape(tf.add_n(sums), [tf.shape(sums[0])[0], *shape])], shape)


def _dense(layer: Any, calls: Calls) -> Iterator[tuple[Any, WeightGradient]]:
    a = _joined([_places(x) for x, _ in calls])
    g = _joined([_places(g) for _, g in calls])
    yield layer.kernel, _product(a, g)
    if layer.bias is not None:
        yield layer.bias, _of_bias(calls, layer.bias)


def _einsum_dense(layer: Any, calls: Calls) -> Iterator[tuple[Any, WeightGradient]]:
    x, w, y = _labels(layer.equation, calls[0][0].shape.rank)
    shared = [c for c in w if c in x and c in y]
    lone = [c for c in x if c not in w and c not in y] + [c for c in w if c not in x and c not in y]
    if shared or lone or x[0] in w or not y.startswith(x[0]):
        raise NotUnderstood(f"the equation {layer.equation!r} of layer {layer.name!r}")
    into = [c for c in w if c in x]
    out = [c for c in w if c in y]
    places = [c for c in x[1:] if c not in w]
    sizes = dict(zip(w, map(int, layer.kernel.shape), strict=True))
    p, q = math.prod(sizes[c] for c in into), math.prod(sizes[c] for c in out)

    def three(value: tf.Tensor, labels: str, last: Sequence[str], size: int) -> tf.Tensor:
        order = [0, *(labels.index(c) for c in [*places, *last])]
        inner = [value.shape[labels.index(c)] for c in places]
        count = -1 if None in inner else math.prod(inner)
        turned = wide(value)
        if order != sorted(order):
            turned = tf.transpose(turned, order)
        return tf.reshape(turned, [tf.shape(value)[0], count, size])

    a = _joined([three(v, x, into, p) for v, _ in calls])
    g = _joined([three(v, y, out, q) for _, v in calls])
    product = "".join([*into, *out])
    back = [product.index(c) for c in w]
    there = [w.index(c) for c in product]

    def to_weight(value: tf.Tensor) -> tf.Tensor:
        return tf.transpose(tf.reshape(value, [sizes[c] for c in product]), back)

    def from_weight(value: tf.Tensor) -> tf.Tensor:
        return tf.reshape(tf.transpose(value, there), [p, q])

    yield layer.kernel, _product(a, g, to_weight, from_weight)
    if layer.bias is not None:
        yield layer.bias, _of_bias(calls, layer.bias)


def _labels(equation: str, rank: int) -> tuple[str, str, str]:
    """Returns the labels of input, weight and output, an ellipsis written out."""
    operands, _, y = equation.replace(" ", "").partition("->")
    x, w = operands.split(",")
    if "..." in equation:
        free = [c for c in string.ascii_uppercase if c not in equation]
        extra = "".join(free[: rank - len(x.replace("...", ""))])
        x, w, y = (part.replace("...", extra) for part in (x, w, y))
    return x, w, y


def _conv(layer: Any, calls: Calls) -> Iterator[tuple[Any, WeightGradient]]:
    pieces: list[list[tf.Tensor]] = []
    for x, g in calls:
        gradients = _places(g)
        for i, window in enumerate(_windows(layer, wide(x), g)):
            if i == len(pieces):
                pieces.append([])
            pieces[i].append(tf.matmul(_places(window), gradients, transpose_a=True))
    parts = [tf.add_n(found) if len(found) > 1 else found[0] for found in pieces]
    yield layer.kernel, Whole(parts, [int(n) for n in layer.kernel.shape])
    if layer.bias is not None:
        yield layer.bias, _of_bias(calls, layer.bias)


def _windows(layer: Any, x: tf.Tensor, gradient: tf.Tensor) -> Iterator[tf.Tensor]:
    """Yields for each offset in the kernel what it was multiplied with, at every place."""
    sizes, outputs = x.shape[1:-1], gradient.shape[1:-1]
    if None in sizes or None in outputs:
        raise NotUnderstood(f"the layer {layer.name!r}, with a size of images that varies")
    reach = [(k - 1) * d for k, d in zip(layer.kernel_size, layer.dilation_rate, strict=True)]
    padding = []
    for n, m, s, r in zip(sizes, outputs, layer.strides, reach, strict=True):
        needed = max((m - 1) * s + r + 1 - n, 0)
        before = {"valid": 0, "same": needed // 2, "causal": r}[layer.padding]
        padding.append((before, max(needed - before, 0)))
    x = tf.pad(x, [(0, 0), *padding, (0, 0)])
    for number in range(math.prod(layer.kernel_size)):
        place: list[int] = []
        rest = number
        for k in reversed(layer.kernel_size):
            place.insert(0, rest % k)
            rest //= k
        begin = [o * d for o, d in zip(place, layer.dilation_rate, strict=True)]
        ends = [b + (m - 1) * s + 1 for b, m, s in zip(begin, outputs, layer.strides, strict=True)]
        inner = [slice(*t) for t in zip(begin, ends, layer.strides, strict=True)]
        yield x[(slice(None), *inner)]


def _embedding(layer: Any, calls: Calls) -> Iterator[tuple[Any, WeightGradient]]:
    rows, width = map(int, layer.embeddings.shape)
    ids, gradients = [], []
    for x, g in calls:
        inner = x.shape[1:]
        count = math.prod(inner) if inner.is_fully_defined() else -1
        ids.append(tf.reshape(tf.cast(x, tf.int32), [tf.shape(x)[0], count]))
        gradients.append(tf.reshape(wide(g), [tf.shape(x)[0], count, width]))
    yield layer.embeddings, Rows(_joined(ids), _joined(gradients), rows)


def _layer_normalization(layer: Any, calls: Calls) -> Iterator[tuple[Any, WeightGradient]]:
    axes = layer.axis if isinstance(layer.axis, list | tuple) else [layer.axis]
    rank = calls[0][0].shape.rank
    axes = sorted(a % rank for a in axes)
    if axes != list(range(rank - len(axes), rank)):
        raise NotUnderstood(f"the layer {layer.name!r}, with this `axis`")
    scaled = []
    for x, g in calls:
        values = wide(x)
        mean, variance = tf.nn.moments(values, axes, keepdims=True)
        scaled.append((x, wide(g) * (values - mean) * tf.math.rsqrt(variance + layer.epsilon)))
    if layer.gamma is not None:
        yield layer.gamma, _of_bias(scaled, layer.gamma)
    if layer.beta is not None:
        yield layer.beta, _of_bias(calls, layer.beta)


class NotUnderstood(Exception):
    """Raised with what it is, of which gradients of examples are not known."""


_RULES: dict[type, Callable[[Any, Calls], Iterator[tuple[Any, WeightGradient]]]] = {
    keras.layers.Dense: _dense,
    keras.layers.EinsumDense: _einsum_dense,
    keras.layers.Conv1D: _conv,
    keras.layers.Conv2D: _conv,
    keras.layers.Conv3D: _conv,
    keras.layers.Embedding: _embedding,
    keras.layers.LayerNormalization: _layer_normalization,
}


def is_understood(layer: Any) -> bool:
    """Whether gradients of a layer's weights are known, example by example."""
    # A subclass may compute something else.
    if type(layer) not in _RULES or not layer.built:
        return False
    changed = (
        getattr(layer, "lora_enabled", False)
        or getattr(layer, "quantization_mode", None)
        or getattr(layer, "rms_scaling", False)
        or getattr(layer, "groups", 1) != 1
        or getattr(layer, "data_format", "channels_last") != "channels_last"
    )
    activation = getattr(layer, "activation", None)
    return not changed and not isinstance(activation, keras.layers.Layer)


def of_layer(layer: Any, calls: Calls) -> Iterator[tuple[Any, WeightGradient]]:
    """Yields each weight of a layer with its gradients.

    Raises:
        NotUnderstood: where the layer does something that is not known.
    """
    yield from _RULES[type(layer)](layer, calls)
