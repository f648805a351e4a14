"""Norms that neither overflow nor underflow, in float32 or wider."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_tapefit.gradients.xla import is_in_xla


class Length(NamedTuple):
    """A norm that may be too large or too small for a float: `size · unit`.

    Attributes:
        size: of moderate size for its type, or inf or NaN where an element is.
        unit: a positive number, mostly 1, of the type of the norm.
    """

    size: tf.Tensor
    unit: tf.Tensor

    @property
    def norm(self) -> tf.Tensor:
        """The norm itself: inf where it is too large for its type."""
        return tf.cast(self.size * tf.cast(self.unit, self.size.dtype), self.unit.dtype)


def wide(value: tf.Tensor) -> tf.Tensor:
    """Casts float16 and bfloat16 to float32, so sums of squares stay exact."""
    return tf.cast(value, tf.float32) if value.dtype.size < 4 else value


def joint_norm(values: Sequence[tf.Tensor]) -> tf.Tensor:
    """Returns `sqrt(Σ x²)` over all elements of all tensors.

    Args:
        values: floating-point tensors of any shapes. Empty: the norm is 0.

    Returns:
        A scalar: float32, or float64 when any of the values is.
    """
    return joint_norm_and_finite(values)[0]


def joint_norm_and_finite(values: Sequence[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns `sqrt(Σ x²)` over all elements of all tensors, and whether all are finite.

    Few float32 values are summed in float64, in which no square of theirs overflows or
    is lost. Of many, the plain sum of squares is taken first. Where it left the range in
    which it is exact, and only there, the sum is taken again over values multiplied by a
    power of two, where it is finite if they are. The norm is inf where it is too large for its
    type or an element is infinite, and NaN where an element is.

    Args:
        values: floating-point tensors of any shapes. Empty: the norm is 0.

    Returns:
        Two scalars: the norm, float32, or float64 when any of the values is; and a bool.
    """
    length, finite = joint_length(values)
    return length.norm, finite


def joint_length(values: Sequence[tf.Tensor]) -> tuple[Length, tf.Tensor]:
    """Returns the joint norm of all tensors as a `Length`, and whether all are finite.

    It is finite where all elements are, as `joint_norm` need not be.
    """
    dtype = _common_dtype(values)
    one = tf.ones((), dtype)
    if not values:
        return Length(tf.zeros((), dtype), one), tf.constant(True)
    values = [tf.cast(value, dtype) for value in values]
    if dtype == tf.float32 and _are_few(values):
        joined = tf.cast(tf.concat([tf.reshape(v, [-1]) for v in values], 0), tf.float64)
        total = tf.reduce_sum(joined * joined)
        return Length(tf.sqrt(total), one), tf.math.is_finite(total)
    low, high, power = _RANGES[dtype]
    squares = _sum_of_squares(values)

    def plain() -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        return tf.sqrt(squares), one, tf.constant(True)

    def scaled() -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        factor = tf.where(squares < 1.0, tf.constant(power, dtype), 1.0 / power)
        again = _sum_of_squares([v * factor for v in values])
        return tf.sqrt(again), 1.0 / factor, tf.math.is_finite(again)

    size, unit, finite = tf.cond((squares > low) & (squares < high), plain, scaled)
    return Length(size, unit), finite


def separate_norms(values: Sequence[tf.Tensor]) -> tf.Tensor:
    """Returns `sqrt(Σ x²)` of each tensor, as safe against overflow as `joint_norm`.

    Args:
        values: floating-point tensors of any shapes.

    Returns:
        A vector: float32, or float64 when any of the values is.
    """
    dtype = _common_dtype(values)
    if not values:
        return tf.zeros(0, dtype)
    values = [tf.cast(value, dtype) for value in values]
    if dtype == tf.float32 and _are_few(values):
        halves = tf.stack([tf.nn.l2_loss(tf.cast(value, tf.float64)) for value in values])
        return tf.cast(tf.sqrt(2.0 * halves), dtype)
    low, high, power = _RANGES[dtype]
    squares = tf.stack([_sum_of_squares([value]) for value in values])

    def scaled() -> tf.Tensor:
        factors = tf.where(squares < 1.0, tf.constant(power, dtype), 1.0 / power)
        again = [_sum_of_squares([v * f]) for v, f in zip(values, tf.unstack(factors), strict=True)]
        safe = (squares > low) & (squares < high)
        return tf.where(safe, tf.sqrt(squares), tf.sqrt(tf.stack(again)) / factors)

    is_safe = tf.reduce_all((squares > low) & (squares < high))
    return tf.cond(is_safe, lambda: tf.sqrt(squares), scaled)


def _are_few(values: Sequence[tf.Tensor]) -> bool:
    """Whether a copy of all elements costs less than a branch."""
    sizes = [value.shape.num_elements() for value in values]
    return not is_in_xla() and None not in sizes and sum(sizes) <= _FEW


_FEW = 2**16

# The sums of squares that lost nothing, and a factor that brings all others there.
_RANGES = {tf.float32: (1e-30, 1e38, 2.0**96), tf.float64: (1e-280, 1e300, 2.0**560)}


def _common_dtype(values: Sequence[tf.Tensor]) -> tf.DType:
    return tf.float64 if any(v.dtype == tf.float64 for v in values) else tf.float32


def _sum_of_squares(values: Sequence[tf.Tensor]) -> tf.Tensor:
    if not is_in_xla():
        return 2.0 * tf.add_n([tf.nn.l2_loss(value) for value in values])
    # On a CPU, XLA adds up all elements one after the other, and columns side by side.
    # The root between keeps it from making one sum of the two.
    columns = [tf.sqrt(tf.reduce_sum(v * v, list(range(len(v.shape) - 1)))) for v in values]
    return tf.add_n([tf.reduce_sum(tf.square(column)) for column in columns])


def rows_norm(values: Sequence[tf.Tensor]) -> tf.Tensor:
    """Returns the joint norm of each row of some matrices, as safe as `joint_norm`.

    Args:
        values: floating-point tensors of shape `[num_rows, ...]`, of rank 2.

    Returns:
        A vector of length `num_rows`: float32, or float64 when any of the values is.
    """
    dtype = _common_dtype(values)
    values = [tf.cast(value, dtype) for value in values]
    low, high, _ = _RANGES[dtype]
    squares = tf.add_n([tf.reduce_sum(tf.square(value), axis=1) for value in values])

    def scaled() -> tf.Tensor:
        norms = [axes_norm(value, [1]) for value in values]
        return axes_norm(tf.concat(norms, axis=1), [1])[:, 0]

    is_safe = tf.reduce_all((squares > low) & (squares < high))
    return tf.cond(is_safe, lambda: tf.sqrt(squares), scaled)


def axes_norm(value: tf.Tensor, axes: Sequence[int]) -> tf.Tensor:
    """Returns norms over `axes`, kept as dimensions of size 1, safe against overflow.

    Args:
        value: a floating-point tensor.
        axes: the axes to reduce over.

    Returns:
        A tensor of the rank of `value`, float32 or wider.
    """
    return axes_length(value, axes).norm


def axes_length(value: tf.Tensor, axes: Sequence[int]) -> Length:
    """Returns norms over `axes` as a `Length`, finite where all elements are."""
    value = wide(value)
    largest = tf.reduce_max(tf.abs(value), axes, keepdims=True)
    divisor = tf.where(tf.math.is_finite(largest) & (largest > 0), largest, 1.0)
    total = tf.reduce_sum(tf.square(value / divisor), axes, keepdims=True)
    return Length(tf.sqrt(total), divisor)


def shortened(
    values: Sequence[tf.Tensor], lengths: Sequence[Length], bounds: Sequence[Any]
) -> list[tf.Tensor]:
    """Scales tensors down where their norms exceed a bound, right for floats of any size.

    What is not longer than its bound, or has no finite norm, stays bit for bit.

    Args:
        values: floating-point tensors.
        lengths: the norm that counts for each, scalars.
        bounds: of each norm, scalar float64, positive or infinite.

    Returns:
        Tensors of the same shapes and dtypes.
    """
    if not values:
        return []
    places = [(id(length), id(bound)) for length, bound in zip(lengths, bounds, strict=True)]
    pairs = dict(zip(places, zip(lengths, bounds, strict=True), strict=True))
    numbers = {place: number for number, place in enumerate(pairs)}
    rows = [(value, numbers[place]) for value, place in zip(values, places, strict=True)]
    each = [root_of_factor(*pair) for pair in pairs.values()]
    several = len(each) > 1
    roots = tf.stack(each) if several else each[0]
    exceeds, is_plain = roots < 1.0, roots > 1e-15

    def unstacked(tensor: tf.Tensor) -> list[tf.Tensor]:
        return tf.unstack(tensor) if several else [tensor]

    def scaled(factors: tf.Tensor, divisors: tf.Tensor | None, select: bool) -> list[tf.Tensor]:
        cast: dict[Any, list[Any]] = {}
        flags = unstacked(exceeds)
        found = []
        for value, number in rows:
            product = wide(value)
            if product.dtype not in cast:
                parts = [factors] if divisors is None else [factors, divisors]
                columns = [unstacked(tf.cast(v, product.dtype)) for v in parts]
                cast[product.dtype] = list(zip(*columns, strict=True))
            product = tf.cast(times(product, *cast[product.dtype][number]), value.dtype)
            # Not the product with 1: it loses the smallest floats.
            found.append(tf.where(flags[number], product, value) if select else product)
        return found

    if is_in_xla() or _are_few(values):
        # Branches would cost more than the values do; XLA takes minutes for some.
        factors = tf.where(is_plain, roots * roots, roots)
        return scaled(factors, tf.where(is_plain, tf.ones_like(roots), 1.0 / roots), True)
    # One choice of three: what is traced in each takes most of the time to the first step.
    kind = tf.cast(tf.reduce_any(exceeds), tf.int32) + tf.cast(~tf.reduce_all(is_plain), tf.int32)
    branches = [
        lambda: [tf.identity(value) for value in values],
        lambda: scaled(roots * roots, None, several),
        lambda: scaled(roots, 1.0 / roots, several),
    ]
    return tf.switch_case(kind, branches)


def root_of_factor(length: Length, bound: Any) -> tf.Tensor:
    """Returns the root of what takes a norm down to its bound; 1 where it stays.

    The root, because the factor itself may be too small for a float.

    Args:
        length: one norm, or a tensor of some.
        bound: positive or infinite, of the same shape.

    Returns:
        A float64 tensor.
    """
    size, unit = (tf.cast(part, tf.float64) for part in length)
    bound = tf.cast(bound, tf.float64)
    exceeds = (size > bound / unit) & tf.math.is_finite(size)
    return tf.where(exceeds, tf.sqrt(bound / size) / tf.sqrt(unit), 1.0)


def times(value: tf.Tensor, factor: tf.Tensor, divisor: tf.Tensor | None = None) -> tf.Tensor:
    """Multiplies by `factor / divisor`, which may be too small for a float, in two steps."""
    # Not by two factors: TensorFlow's graph optimizer makes one of them, for it multiplies
    # the smaller tensors first.
    value = value if divisor is None else value / tf.cast(divisor, value.dtype)
    return value * tf.cast(factor, value.dtype)


def clamped(values: Sequence[tf.Tensor], bound: Any) -> list[tf.Tensor]:
    """Clamps elements to `[-bound, bound]`; what lies inside stays bit for bit.

    Args:
        values: floating-point tensors.
        bound: scalar float64, positive or infinite.
    """
    if not values:
        return []

    def clamp(value: tf.Tensor) -> tf.Tensor:
        limit = _limit(value, bound)
        small = tf.abs(wide(value)) <= limit
        return tf.where(
            small, value, tf.cast(tf.clip_by_value(wide(value), -limit, limit), value.dtype)
        )

    exceeds = [tf.reduce_any(tf.abs(wide(v)) > _limit(v, bound)) for v in values]
    return tf.cond(
        tf.reduce_any(tf.stack(exceeds)),
        lambda: [clamp(value) for value in values],
        lambda: [tf.identity(value) for value in values],
    )


def _limit(value: tf.Tensor, bound: Any) -> tf.Tensor:
    # Not below what the type can hold, where everything would become zero.
    dtype = wide(value).dtype
    return tf.maximum(tf.cast(bound, dtype), np.finfo(dtype.as_numpy_dtype).tiny)
