"""A batch split into parts for the backward pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import keras
import tensorflow as tf

from keras_tapefit.backward.base import Batch, GradientMethod, Objective
from keras_tapefit.gradients import Gradients


class MicroBatches(GradientMethod):
    """Computes gradients part by part, so that only one part's activations are alive.

    What `compile(micro_batches=k)` puts around the way gradients are computed. The
    parts' gradients are averaged as the loss averages examples, so the result is the
    gradient of the whole batch, a last batch that does not divide evenly included.

    Args:
        method: how the gradients of one part are computed.
        num_parts: the number of parts; a batch with fewer examples has as many parts
            as examples.
    """

    def __init__(self, method: GradientMethod, num_parts: int) -> None:
        if not method.takes_parts:
            raise ValueError(
                f"`{type(method).__name__}` needs the whole batch at once, so "
                f"`micro_batches` must be 1. Received: micro_batches={num_parts}. Where it "
                "has a `chunk_size`, that is what bounds the memory."
            )
        self.method = method
        self.num_parts = num_parts

    def compute(self, objective: Objective, batch: Batch) -> tuple[Gradients, Any]:
        bounds = _bounds(objective.batch_size(batch), self.num_parts)
        first = self._part(objective, batch, *bounds[0])
        total = first.gradients.scale(first.weight)
        parts = [first]
        for start, stop in bounds[1:]:
            # One after the other: run side by side, all parts would be in memory.
            with tf.control_dependencies([v for v in _flat(total) if v is not None]):
                part = self._part_or_nothing(objective, batch, start, stop, first)
                total = total.plus(part.gradients.scale(part.weight))
            parts.append(part)
        weights = tf.stack([part.weight for part in parts])
        # A replica may have no example of the last batch.
        shares = tf.math.divide_no_nan(weights, tf.reduce_sum(weights))
        objective.note(tf.reduce_sum(shares * tf.stack([part.loss for part in parts])))
        objective.note_parts(tf.stack([part.norm for part in parts]), weights)
        outputs = keras.tree.map_structure(_joined, *(part.outputs for part in parts))
        masks = [part.masks for part in parts]
        objective.set_masks(outputs, [_joined(*column) for column in zip(*masks, strict=True)])
        return total.scale(tf.math.divide_no_nan(1.0, tf.reduce_sum(weights))), outputs

    def _part(self, objective: Objective, batch: Batch, start: Any, stop: Any) -> _Part:
        part = keras.tree.map_structure(
            lambda value: None if value is None else value[start:stop], batch
        )
        gradients, outputs = self.method.compute(objective, part)
        weight = tf.cast(objective.weight(part, outputs), tf.float32)
        norm = gradients.global_norm() if objective.wants_parts else tf.zeros(())
        loss = tf.cast(objective.noted, tf.float32)
        return _Part(gradients, outputs, objective.masks(outputs), loss, weight, norm)

    def _part_or_nothing(
        self, objective: Objective, batch: Batch, start: Any, stop: Any, like: _Part
    ) -> _Part:
        """Computes a part that is empty where the batch has fewer examples than parts."""
        if isinstance(start, int):
            return self._part(objective, batch, start, stop)
        variables = like.gradients.variables
        missing = [g is None for g in like.gradients.values()]

        def computed() -> Any:
            part = self._part(objective, batch, start, stop)
            values = [
                g for g, none in zip(part.gradients.values(), missing, strict=True) if not none
            ]
            masks = [m for m in part.masks if m is not None]
            return values, part.outputs, masks, part.loss, part.weight, part.norm

        def nothing() -> Any:
            values = [_nothing_like(g) for g in like.gradients.values() if g is not None]
            outputs = keras.tree.map_structure(lambda v: v[:0], like.outputs)
            masks = [m[:0] for m in like.masks if m is not None]
            zero = tf.zeros(())
            return values, outputs, masks, zero, zero, tf.zeros_like(like.norm)

        values, outputs, masks, loss, weight, norm = tf.cond(stop > start, computed, nothing)
        left = iter(values)
        pairs = [
            (None if none else next(left), v) for none, v in zip(missing, variables, strict=True)
        ]
        left = iter(masks)
        masks = [None if mask is None else next(left) for mask in like.masks]
        return _Part(Gradients(pairs), outputs, masks, loss, weight, norm)


def _joined(*values: Any) -> Any:
    return None if values[0] is None else tf.concat(values, axis=0)


class _Part(NamedTuple):
    gradients: Gradients
    outputs: Any
    masks: list[Any]
    loss: tf.Tensor
    weight: tf.Tensor
    norm: tf.Tensor


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


def _flat(gradients: Gradients) -> list[Any]:
    return [g.values if isinstance(g, tf.IndexedSlices) else g for g in gradients.values()]


def _nothing_like(gradient: Any) -> Any:
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(gradient.values[:0], gradient.indices[:0], gradient.dense_shape)
    return tf.zeros_like(gradient)
