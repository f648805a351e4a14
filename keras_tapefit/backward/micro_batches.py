"""A batch split into parts for the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
import tensorflow as tf

from keras_tapefit.backward.backpropagation import Backpropagation
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
        size = objective.batch_size(batch)
        bounds = _bounds(size, self.num_parts)
        # Of another method the gradient may be no multiple where the loss is.
        if type(self.method) is Backpropagation and not self.keeps_norms:
            objective = objective.of_parts(size)
        part, sums = self._compute_part(objective, objective.part(batch, *bounds[0]))
        parts, rows = [part], [part.rows]
        if len(bounds) > 2 and objective.may_loop() and part.fits_in_loop:
            rest, joined, sums = self._loop(objective, batch, bounds[1:], part, sums)
            parts.extend(rest)
            rows.append(joined)
        else:
            for start, stop in bounds[1:]:
                # One after the other: run side by side, all parts would be in memory.
                with tf.control_dependencies(_values(sums)):
                    batch_of_part = objective.part(batch, start, stop)
                    part, sums = self._compute_part(objective, batch_of_part, sums)
                parts.append(part)
                rows.append(part.rows)
        quotients = [
            Quotient.combined(column)
            for column in zip(*(part.quotients for part in parts), strict=True)
        ]
        columns = zip(quotients, parts[0].quotients, sums, strict=True)
        for quotient, of_first, total in columns:
            if not of_first.adds_up:
                total = total.scale(tf.math.divide_no_nan(1.0, quotient.divisor))
            quotient.gradients = total
        outputs, masks = keras.tree.map_structure(_joined, *rows)
        objective.set_masks(outputs, masks)
        sizes = tf.stack([tf.cast(part.examples, tf.float32) for part in parts])
        norms = tf.stack([part.norm for part in parts]) if self.keeps_norms else None
        examples = tf.reduce_sum(sizes)
        all_examples = tf.add_n([part.all_examples for part in parts])
        taps = _taps(parts, quotients[0].divisor)
        return Computed(quotients, outputs, examples, all_examples, norms, sizes, taps)

    def _compute_part(
        self, objective: Objective, batch: Batch, sums: Sequence[Gradients] = ()
    ) -> tuple[_Part, list[Gradients]]:
        """Computes a part, and adds its gradients, times their divisors, to `sums`."""
        computed = self.method.compute(objective, batch)
        found = [_weighted(quotient) for quotient in computed.quotients]
        part = _Part(
            [replace(quotient, gradients=None) for quotient in computed.quotients],
            computed.examples,
            computed.all_examples,
            _norm(computed) if self.keeps_norms else None,
            (computed.outputs, objective.masks(computed.outputs)),
            computed.taps,
        )
        return part, [a.plus(b) for a, b in zip(sums, found, strict=True)] if sums else found

    def _loop(
        self,
        objective: Objective,
        batch: Batch,
        bounds: list[tuple[Any, Any]],
        first: _Part,
        sums: list[Gradients],
    ) -> tuple[list[_Part], Any, list[Gradients]]:
        """Computes the parts after the first in a loop: one is traced, however many they are.

        Args:
            objective: the loss of the model.
            batch: `(x, y, sample_weight)`.
            bounds: where these parts begin and end.
            first: the first part.
            sums: its gradients, times their divisors.

        Returns:
            The parts, the outputs and masks of all of them, and the sums.
        """
        number = len(bounds)
        lengths = {stop - start for start, stop in bounds if isinstance(start, int)}
        length = lengths.pop() if len(lengths) == 1 else None
        starts, stops = (tf.stack(column) for column in zip(*bounds, strict=True))

        def array(like: tf.Tensor) -> tf.TensorArray:
            shape = [length, *like.shape[1:]] if like.shape.rank else []
            return tf.TensorArray(like.dtype, number, element_shape=shape, infer_shape=False)

        def body(i: Any, present: Any, scalars: Any, rows: Any) -> Any:
            so_far = [total.with_present(p) for total, p in zip(sums, present, strict=True)]
            batch_of_part = objective.part(batch, starts[i], stops[i], length)
            part, so_far = self._compute_part(objective, batch_of_part, so_far)
            written = [
                [a.write(i, v) for a, v in zip(arrays, _tensors(tree), strict=True)]
                for arrays, tree in ((scalars, part.scalars()), (rows, part.rows))
            ]
            return i + 1, [total.present() for total in so_far], *written

        scalars, rows = ([array(v) for v in _tensors(t)] for t in (first.scalars(), first.rows))
        variables = [tf.constant(0), [total.present() for total in sums], scalars, rows]
        invariants = tf.nest.map_structure(_any_number_of_rows, variables)
        # It begins with what is ready: without the tie, during the first part.
        with tf.control_dependencies(_values(sums)):
            _, present, scalars, rows = tf.while_loop(
                lambda i, *_: i < number,
                body,
                variables,
                shape_invariants=invariants,
                parallel_iterations=1,
                maximum_iterations=number,
            )
        columns = [tf.unstack(a.stack(), number) for a in scalars]
        parts = [first.with_scalars(values) for values in zip(*columns, strict=True)]
        joined = _filled(first.rows, [a.concat() for a in rows])
        found = [total.with_present(p) for total, p in zip(sums, present, strict=True)]
        return parts, joined, found


@dataclass
class _Part:
    """The rest of a part, once its gradients have been added to those of the others.

    Attributes:
        quotients: without gradients.
        examples: the number of this replica's examples.
        all_examples: the number of those of all replicas.
        norm: of the gradient; `None`: nobody asked for it.
        rows: the outputs and their masks.
        taps: what layers returned, where somebody asked for it.
    """

    quotients: list[Quotient]
    examples: tf.Tensor
    all_examples: tf.Tensor
    norm: tf.Tensor | None
    rows: tuple[Any, list[Any]]
    taps: list[Taps]

    @property
    def fits_in_loop(self) -> bool:
        """Whether all that is kept is scalars and arrays of examples."""
        arrays = all(isinstance(v, tf.Tensor) and v.shape.rank for v in _present(self.rows))
        return arrays and not self.taps

    def scalars(self) -> Any:
        losses = [[q.loss, q.divisor, q.terms] for q in self.quotients]
        return [losses, self.examples, self.all_examples, self.norm]

    def with_scalars(self, values: Sequence[tf.Tensor]) -> _Part:
        losses, examples, all_examples, norm = _filled(self.scalars(), values)
        quotients = [Quotient(*each) for each in losses]
        return replace(
            self, quotients=quotients, examples=examples, all_examples=all_examples, norm=norm
        )


def _present(tree: Any) -> list[Any]:
    return [value for value in keras.tree.flatten(tree) if value is not None]


def _tensors(tree: Any) -> list[tf.Tensor]:
    return [tf.convert_to_tensor(value) for value in _present(tree)]


def _filled(tree: Any, values: Sequence[Any]) -> Any:
    """Returns a tree with other values for those that are not `None`."""
    left = iter(values)
    return keras.tree.map_structure(lambda v: None if v is None else next(left), tree)


def _any_number_of_rows(value: Any) -> Any:
    """Returns the type of a sparse gradient that grows in a loop; `None`: it is what it is."""
    if not isinstance(value, tf.IndexedSlices):
        return None
    dense_shape = None if value.dense_shape is None else value.dense_shape.dtype
    kinds = value.values.dtype, value.indices.dtype, dense_shape
    return tf.IndexedSlicesSpec(value.shape, *kinds, indices_shape=[None])


def _weighted(quotient: Quotient) -> Gradients:
    gradients = quotient.gradients
    assert gradients is not None
    return gradients if quotient.adds_up else gradients.scale(quotient.divisor)


def _norm(part: Computed) -> tf.Tensor:
    """Returns the norm of the gradient of this replica's part, as if it were alone."""
    norm = tf.cast(part.gradients.global_norm(), tf.float32)
    return norm * tf.math.divide_no_nan(part.all_examples, part.examples)


def _taps(parts: list[_Part], divisor: tf.Tensor | None) -> list[Taps]:
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
