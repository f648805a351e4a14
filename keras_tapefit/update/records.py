"""One record a step, kept on the device until a callback fetches it.

A step writes one row of a ring buffer, so there is a record of every step whatever
`steps_per_execution` is, under XLA and on replicas: no operation that XLA lacks, and
nothing that waits for the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_tapefit.gradients import variable_path
from keras_tapefit.gradients.norms import joint_norm
from keras_tapefit.hooks.step import LogEntry
from keras_tapefit.update import optimizers, replicas
from keras_tapefit.update.watch import NUM_BINS, RecordRequest, Seen, Watch

_SCALARS = ("loss", "learning_rate", "gradient_norm", "gradient_norm_after", "skipped")
# What updates made: the global norm after the hooks, 1 where skipped, and by variable norms
# after the hooks, changes and sizes; `None` where they are not asked for.
_Made = tuple[Any, Any, Any, Any, Any]
# Of the numbers in a buffer, beyond which it keeps fewer steps.
_ROOM = 2**21


class Records:
    """The records of a model's last steps.

    To be made in the strategy's scope.

    Args:
        request: what is recorded.
        variables: all that may ever be trained.
        counter: the number of steps so far, a scalar int64 variable.
        min_size: the least number of steps to be kept.
        entries: the log entries of hooks that are recorded too.
    """

    def __init__(
        self,
        request: RecordRequest,
        variables: Sequence[Any],
        counter: Any,
        min_size: int,
        entries: Sequence[str] = (),
    ) -> None:
        self.request = request
        self.counter = counter
        self.entries = list(entries)
        self.paths = [variable_path(v) for v in variables]
        self.shapes = {variable_path(v): tuple(v.shape) for v in variables}
        self._places = {id(v): i for i, v in enumerate(variables)}
        self._kept = [variables[i] for i in request.weights]
        self.columns = self._column_names()
        self.size = max(min_size, min(256, _ROOM // len(self.columns)))
        self._rows = _state((self.size, len(self.columns)), "records")
        self._histograms: Any = None
        self.num_histograms = 0
        if request.histograms_every:
            self.num_histograms = 1 + -(-self.size // request.histograms_every)
            shape = (self.num_histograms, len(variables), 2 + NUM_BINS)
            self._histograms = _state(shape, "histograms")
        self._closing = _state((2 + 3 * len(variables),), "closing")

    def _column_names(self) -> list[str]:
        request = self.request
        names = list(_SCALARS)
        if request.updates:
            names.append("update_ratio")
        if request.per_variable:
            kinds = ["gradient_norm", "gradient_norm_after"]
            kinds += ["update_ratio"] if request.updates else []
            names += [f"{kind}/{path}" for kind in kinds for path in self.paths]
        for variable in self._kept:
            path = variable_path(variable)
            places = [",".join(map(str, place)) for place in np.ndindex(*variable.shape)]
            names += [f"weight/{path}[{place}]" if place else f"weight/{path}" for place in places]
        return names + self.entries

    @property
    def variables(self) -> list[Any]:
        """The state."""
        found = [self._rows, self._closing]
        return found if self._histograms is None else [*found, self._histograms]

    def watch(self) -> Watch:
        """Returns what looks at an update of the step that runs now."""
        return Watch(self.request, self._is_due() if self.num_histograms else None)

    def _is_due(self) -> tf.Tensor:
        return (self.counter.value + 1) % self.request.histograms_every == 0

    def open_window(self) -> None:
        """Forgets the update of the last window of accumulated gradients."""
        self._closing.assign(tf.fill(self._closing.shape, float("nan")))

    def close_window(self, variables: Sequence[Any], seen: Seen) -> None:
        """Keeps what was seen of the update of a window; may be called in a branch.

        A step may close several windows, of different variables.
        """
        after, skipped, *columns = _joined([self._closed(), self._of_update(variables, seen)])
        nothing = tf.fill([len(self.paths)], float("nan"))
        columns = [nothing if column is None else column for column in columns]
        self._closing.assign(tf.concat([tf.stack([after, skipped]), *columns], axis=0))

    def write(
        self,
        updates: Sequence[tuple[Sequence[Any], Seen]],
        loss: Any,
        rate: Any,
        entries: Sequence[LogEntry] = (),
    ) -> None:
        """Writes the record of a step.

        Args:
            updates: the variables of each update of the step, and what was seen of it.
            loss: of the global batch, scalar float32.
            rate: the learning rate, scalar float32.
            entries: what hooks report.
        """
        made = [pair for pair in updates if pair[1].after is not None]
        in_window = len(made) < len(updates)
        found = [self._of_update(*pair) for pair in made]
        after, skipped, norms_after, changes, sizes = _joined(
            [*found, self._closed()] if in_window else found
        )
        # A batch may be skipped that makes no update.
        skipped = tf.reduce_max(tf.stack([skipped, *(seen.skipped for _, seen in updates)]))
        before = _joint([seen.before for _, seen in updates])
        parts = [tf.stack([loss, rate, before, after, skipped])]
        if self.request.updates:
            there = [tf.where(tf.math.is_nan(sizes), 0.0, v) for v in (changes, sizes)]
            ratio = tf.math.divide_no_nan(joint_norm(there[:1]), joint_norm(there[1:]))
            if in_window:
                ratio = tf.where(tf.math.is_nan(after), after, ratio)
            parts.append(tf.reshape(ratio, [1]))
        if self.request.per_variable:
            parts += [self._spread([(v, s.norms) for v, s in updates]), norms_after]
            if self.request.updates:
                parts.append(tf.math.divide_no_nan(changes, sizes))
        for variable in self._kept:
            parts.append(tf.reshape(tf.cast(variable.value, tf.float32), [-1]))
        if self.entries:
            missing = tf.constant(float("nan"))
            values = {
                # Of no weight is what a hook says of a step in which it does not act.
                e.name: tf.where(tf.cast(e.weight, tf.float32) > 0.0, e.value, missing)
                for e in entries
            }
            parts.append(tf.stack([values.get(name, missing) for name in self.entries]))
        _put(self._rows, self.counter.value % self.size, tf.concat(parts, axis=0))
        if self.num_histograms:
            self._write_histograms(updates)
        self.counter.assign(self.counter.value + 1)

    def _of_update(self, variables: Sequence[Any], seen: Seen) -> _Made:
        norms_after, changes, sizes = (
            None if values is None else self._spread([(variables, values)])
            for values in (seen.norms_after, seen.changes, seen.sizes)
        )
        return seen.after, seen.skipped, norms_after, changes, sizes

    def _closed(self) -> _Made:
        closing = tf.convert_to_tensor(self._closing.value)
        skipped = tf.where(tf.math.is_nan(closing[1]), 0.0, closing[1])
        norms_after, changes, sizes = tf.split(closing[2:], 3)
        return closing[0], skipped, norms_after, changes, sizes

    def _write_histograms(self, updates: Any) -> None:
        seen = [(v, s.histograms) for v, s in updates if s.histograms is not None]
        number = self.counter.value // self.request.histograms_every

        def put() -> tf.Tensor:
            _put(self._histograms, number % self.num_histograms, self._spread(seen))
            return tf.constant(0)

        tf.cond(self._is_due(), put, lambda: tf.constant(0))

    def _spread(self, parts: Sequence[tuple[Sequence[Any], Any]]) -> tf.Tensor:
        """Brings values of some variables to the places of all, NaN for the others."""
        sources = np.zeros(len(self.paths), "int32")
        start = 1
        for variables, _ in parts:
            for offset, variable in enumerate(variables):
                if id(variable) in self._places:
                    sources[self._places[id(variable)]] = start + offset
            start += len(variables)
        values = [value for _, value in parts]
        if len(values) == 1 and np.array_equal(sources, np.arange(1, start)):
            return values[0]
        nothing = tf.fill([1, *values[0].shape[1:]], float("nan"))
        return tf.gather(tf.concat([nothing, *values], axis=0), sources)

    def count(self) -> int:
        """Returns the number of steps so far; waits for the device."""
        return int(self.counter.numpy())

    def read(self, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the numbers of the steps from `start` on that are kept, and their rows."""
        stop = self.count()
        steps = np.arange(max(start, stop - self.size), stop)
        if not len(steps):
            return steps, np.zeros((0, len(self.columns)), "float32")
        return steps, tf.gather(self._rows.value, steps % self.size).numpy()

    def read_histograms(self, start: int) -> list[tuple[int, np.ndarray]]:
        """Returns the numbers of the steps from `start` on with histograms, and those."""
        every, stop = self.request.histograms_every, self.count()
        steps = [s for s in range(start, stop) if (s + 1) % every == 0][-self.num_histograms :]
        if not steps:
            return []
        places = [s // every % self.num_histograms for s in steps]
        return list(zip(steps, tf.gather(self._histograms.value, places).numpy(), strict=True))


class StepRecord:
    """Gathers what is seen of one step, and writes it at the step's end.

    Args:
        records: where to.
    """

    def __init__(self, records: Records) -> None:
        self._records = records
        self._updates: list[tuple[list[Any], Seen]] = []
        self._in_window = False
        self._rate: Any = None

    def begin_update(self, optimizer: Any, in_window: bool) -> Watch:
        """Returns the watch of the next update."""
        self._rate = optimizers.learning_rate(optimizer)
        if in_window and not self._in_window:
            self._records.open_window()
        self._in_window |= in_window
        return self._records.watch()

    def end_update(self, variables: list[Any], seen: Seen) -> None:
        """Takes up what was seen of an update."""
        self._updates.append((variables, seen))

    def write(self, loss: Any, entries: Sequence[LogEntry] = ()) -> None:
        """Writes the record.

        Args:
            loss: this replica's share of the loss, or `None` where it is not known.
            entries: what hooks report.
        """
        share = tf.constant(float("nan")) if loss is None else tf.cast(loss, tf.float32)
        total = tf.reshape(replicas.sum_over(share), ())
        self._records.write(self._updates, total, self._rate, entries)


def make_counter(start: int) -> Any:
    """Makes the variable that counts steps; to be called in the strategy's scope."""
    return keras.Variable(
        np.int64(start),
        dtype="int64",
        trainable=False,
        autocast=False,
        aggregation="none",
        name="recorded_steps",
    )


def _state(shape: tuple[int, ...], name: str) -> Any:
    return keras.Variable(
        tf.fill(shape, float("nan")),
        dtype="float32",
        trainable=False,
        autocast=False,
        aggregation="none",
        name=name,
    )


def _put(buffer: Any, index: tf.Tensor, row: tf.Tensor) -> None:
    buffer.value.scatter_update(tf.IndexedSlices(row[None], tf.reshape(index, [1])))


def _joined(updates: Sequence[_Made]) -> _Made:
    """Returns what several updates of one step make together; NaN where none was made."""
    after, skipped, *columns = updates[0]
    for other_after, other_skipped, *others in updates[1:]:
        is_none = tf.math.is_nan(after) & tf.math.is_nan(other_after)
        both = [tf.where(tf.math.is_nan(norm), 0.0, norm) for norm in (after, other_after)]
        after = tf.where(is_none, after, joint_norm(both))
        skipped = tf.maximum(skipped, other_skipped)
        columns = [_filled(*pair) for pair in zip(columns, others, strict=True)]
    return after, skipped, columns[0], columns[1], columns[2]


def _filled(first: Any, second: Any) -> Any:
    if first is None or second is None:
        return second if first is None else first
    return tf.where(tf.math.is_nan(second), first, second)


def _joint(norms: Sequence[tf.Tensor]) -> tf.Tensor:
    return norms[0] if len(norms) == 1 else joint_norm(norms)
