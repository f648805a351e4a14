"""A batch split into parts for the backward pass."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from keras_tapefit.backward.base import (
    Batch,
    Computed,
    GradientMethod,
    Objective,
    Quotient,
)
from keras_tapefit.backward.taps import Taps
from keras_tapefit.gradients import Gradients
from keras_tapefit.gradients.sparse import values_of


class MicroBatches(GradientMethod):
    """Computes gradients part by part, so that only one part's activations are alive.

    What `compile(micro_batches=k)` puts around the way gradients are computed. The
    parts' gradients are averaged as the loss averages examples, so the result is the
    gradient of the whole batch, a last batch that does not divide evenly included.

    Args:
        method: how the gradients of one part are computed.
        num_parts: the number of parts; a batch with fewer examples has as many parts
            as examples.
        keeps_norms: whether the norm of each part's gradient is wanted.
    """

    def __init__(self, method: GradientMethod, num_parts: int, keeps_norms: bool = False) -> None:
        if not method.takes_parts:
            raise ValueError(
                f"`{type(method).__name__}` needs the whole batch at once, so "
                f"`micro_batches` must be 1. Received: micro_batches={num_parts}. Where it "
                "has a `chunk_size`, that is what bounds the memory."
            )
        self.method = method
        self.num_parts = num_parts
        self.keeps_norms = keeps_norms

    def compute(self, objective: Objective, batch: Batch) -> Computed:
        bounds = _bounds(objective.batch_size(batch), self.num_parts)
        parts: list[Computed] = []
        masks: list[list[Any]] = []
        sums: list[Gradients] = []
        for start, stop in bounds:
            # One after the other: run side by side, all parts would be in memory.
            with tf.control_dependencies(_values(sums)):
                part = objective.part(batch, start, stop)
                computed = self.method.compute(objective, part)
                weighted = [_weighted(quotient) for quotient in computed.quotients]
                sums = [a.plus(b) for a, b in zip(sums, weighted, strict=bool(sums))] or weighted
            parts.append(computed)
            masks.append(objective.masks(computed.outputs))
        quotients = [
            Quotient.combined(column)
            for column in zip(*(part.quotients for part in parts), strict=True)
        ]
        for quotient, total in zip(quotients, sums, strict=True):
            quotient.gradients = (
                total
                if quotient.divisor is None
                else total.scale(tf.math.divide_no_nan(1.0, quotient.divisor))
            )
        outputs = keras.tree.map_structure(_joined, *(part.outputs for part in parts))
        objective.set_masks(outputs, [_joined(*column) for column in zip(*masks, strict=True)])
        sizes = tf.stack([tf.cast(part.examples, tf.float32) for part in parts])
        norms = None
        if self.keeps_norms:
            norms = tf.stack([_norm(part) for part in parts])
        examples = tf.reduce_sum(sizes)
        all_examples = tf.add_n([part.all_examples for part in parts])
        taps = _taps(parts, quotients[0].divisor)
        return Computed(quotients, outputs, examples, all_examples, norms, sizes, taps)


def _weighted(quotient: Quotient) -> Gradients:
    gradients = quotient.gradients
    assert gradients is not None
    return gradients if quotient.divisor is None else gradients.scale(quotient.divisor)


def _norm(part: Computed) -> tf.Tensor:
    """Returns the norm of the gradient of this replica's part, as if it were alone."""
    norm = tf.cast(part.gradients.global_norm(), tf.float32)
    return norm * tf.math.divide_no_nan(part.all_examples, part.examples)


def _taps(parts: list[Computed], divisor: tf.Tensor | None) -> list[Taps]:
    """Returns the taps of all parts, with what each part's loss counts for."""
    for part in parts:
        for taps in part.taps:
            own = part.quotients[0].divisor
            if divisor is not None and own is not None:
                taps.share = tf.math.divide_no_nan(own, divisor)
    return [taps for part in parts for taps in part.taps]


def _joined(*values: Any) -> Any:
    return None if values[0] is None else tf.concat(values, axis=0)


def _values(sums: list[Gradients]) -> list[tf.Tensor]:
    return [values_of(g) for total in sums for g in total.values() if g is not None]


def _bounds(size: Any, num_parts: int) -> list[tuple[Any, Any]]:
    """Returns where the parts begin and end: as even as can be, the larger ones first.

    Args:
        size: of the batch, an integer where it is known and else a scalar tensor.
        num_parts: the number of parts.
    """
    if isinstance(size, int):
        num_parts = max(1, min(num_parts, size))
    quotient, remainder = size // num_parts, size % num_parts
    smaller = min if isinstance(size, int) else tf.minimum
    edges = [i * quotient + smaller(i, remainder) for i in range(num_parts + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))
