"""One update as a record of it sees it: true gradients, what hooks made of them, weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any, NamedTuple

import tensorflow as tf

from keras_tapefit.gradients import Gradients
from keras_tapefit.gradients.norms import separate_norms
from keras_tapefit.gradients.sparse import values_of

NUM_BINS = 30
# A sum of ones in float32 is exact this far, and many short sums run side by side.
_CHUNK = 2**16


@dataclass(frozen=True)
class RecordRequest:
    """A request to record more of each step than every record holds.

    Args:
        per_variable: whether the norm of each variable's gradient is.
        updates: whether the update-to-weight ratio is, of each variable too where
            `per_variable` is.
        histograms_every: the number of steps from one histogram of each variable's
            gradient to the next; 0: none.
        weights: the positions of variables whose values are.
    """

    per_variable: bool = False
    updates: bool = False
    histograms_every: int = 0
    weights: tuple[int, ...] = ()

    def merged(self, other: RecordRequest) -> RecordRequest:
        """Returns a request for what either asks for."""
        return RecordRequest(
            self.per_variable or other.per_variable,
            self.updates or other.updates,
            gcd(self.histograms_every, other.histograms_every),
            tuple(sorted({*self.weights, *other.weights})),
        )


class Seen(NamedTuple):
    """The record of one update: scalars, and vectors over its variables.

    Attributes:
        before: the global norm before the hooks.
        norms: the norm of each gradient before the hooks.
        histograms: of shape `[num_variables, 2 + NUM_BINS]`: the least and the largest
            value, and the counts in between; zeros where none is due.
        after: the global norm after the hooks; `None`: no update was made here.
        norms_after: the norm of each gradient after the hooks.
        changes: the norm of each variable's change.
        sizes: the norm of each variable before the update.
        skipped: 1 where the update was not made, else 0.
    """

    before: Any
    norms: Any = None
    histograms: Any = None
    after: Any = None
    norms_after: Any = None
    changes: Any = None
    sizes: Any = None
    skipped: Any = None


class Watch:
    """Looks at one update, without a hand in it.

    Args:
        request: what to look at.
        due: scalar bool, whether histograms are made in this step.
    """

    def __init__(self, request: RecordRequest, due: Any = None) -> None:
        self.request = request
        self._due = due
        self._given: Any = None
        self._seen: dict[str, Any] = {}
        self._weights: list[tf.Tensor] = []

    def given(self, gradients: Gradients) -> None:
        """Looks at the true gradients, summed over replicas and without loss scale."""
        self._given = gradients
        self._seen["before"] = _narrow(gradients.global_norm())
        if self.request.per_variable:
            self._seen["norms"] = _norms(gradients)
        if self._due is not None:
            shape = (len(gradients), 2 + NUM_BINS)
            self._seen["histograms"] = tf.cond(
                self._due,
                lambda: tf.stack([_histogram(g) for g in _values(gradients)]),
                lambda: tf.zeros(shape),
            )

    def made(self, gradients: Gradients) -> None:
        """Looks at what the hooks made of the gradients."""
        if gradients is self._given:
            self._seen["after"] = self._seen["before"]
            self._seen["norms_after"] = self._seen.get("norms")
            return
        self._seen["after"] = _narrow(gradients.global_norm())
        if self.request.per_variable:
            self._seen["norms_after"] = _norms(gradients)

    def updating(self, variables: Sequence[Any]) -> None:
        """Remembers the weights."""
        if self.request.updates:
            self._weights = [tf.identity(v.value) for v in variables]

    def updated(self, variables: Sequence[Any]) -> None:
        """Looks at what became of the weights."""
        if self.request.updates:
            after = [tf.convert_to_tensor(v.value) for v in variables]
            changes = [new - old for new, old in zip(after, self._weights, strict=True)]
            self._seen["changes"] = _narrow(separate_norms(changes))
            self._seen["sizes"] = _narrow(separate_norms(self._weights))

    def seen(self, accepted: tf.Tensor | None) -> Seen:
        """Returns what was seen.

        Args:
            accepted: scalar bool, whether the step is; `None`: always.
        """
        skipped = tf.constant(0.0) if accepted is None else tf.cast(~accepted, tf.float32)
        return Seen(**self._seen, skipped=skipped)


def _narrow(value: tf.Tensor) -> tf.Tensor:
    return tf.cast(value, tf.float32)


def _values(gradients: Gradients) -> list[tf.Tensor]:
    """Returns the values of each gradient: `None` is zero, sparse its own rows."""
    unique = gradients.with_unique_rows().values()
    return [tf.zeros(1) if g is None else values_of(g) for g in unique]


def _norms(gradients: Gradients) -> tf.Tensor:
    return _narrow(separate_norms(_values(gradients)))


def _histogram(values: tf.Tensor) -> tf.Tensor:
    """Returns least and largest finite value and the counts in equal bins between them."""
    values = _narrow(tf.reshape(values, [-1]))
    finite = tf.math.is_finite(values)
    low = tf.reduce_min(tf.where(finite, values, float("inf")))
    high = tf.reduce_max(tf.where(finite, values, float("-inf")))
    # Halves: the difference of two finite numbers may be infinite.
    width = (0.5 * high - 0.5 * low) / NUM_BINS
    place = tf.math.divide_no_nan(0.5 * tf.where(finite, values, low) - 0.5 * low, width)
    place = tf.where(tf.math.is_finite(place), place, 0.0)
    bins = tf.clip_by_value(tf.cast(place, tf.int32), 0, NUM_BINS - 1)
    size = values.shape[0]
    num_chunks = 1 if size is None else max(1, -(-size // _CHUNK))
    if num_chunks > 1:
        bins += NUM_BINS * (tf.range(size) // _CHUNK)
    counts = tf.math.unsorted_segment_sum(tf.cast(finite, tf.float32), bins, num_chunks * NUM_BINS)
    counts = tf.reduce_sum(tf.reshape(counts, [num_chunks, NUM_BINS]), axis=0)
    return tf.concat([tf.stack([low, high]), counts], axis=0)
