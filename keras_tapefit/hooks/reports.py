"""Epoch means of what hooks report, kept outside the model's metrics."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from typing import TypeAlias

import keras
import tensorflow as tf

from keras_tapefit.hooks.base import GradientHook
from keras_tapefit.hooks.step import Report

# Of each entry the hooks that report it; one whose hooks are all gone is let go of. No
# attribute: what hooks there are is no part of what models that share traces compare.
_Owners: TypeAlias = dict[str, "weakref.WeakSet[GradientHook]"]
_owners: weakref.WeakKeyDictionary[Reports, _Owners] = weakref.WeakKeyDictionary()


class Reports:
    """Sums and counts of reported scalars, one variable for all.

    Args:
        capacity: the number of log entries there is room for.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.live: list[str] = []
        self._entries: dict[str, tuple[int, str]] = {}
        _owners[self] = {}
        self._state = keras.Variable(
            tf.zeros((2, capacity)),
            dtype="float32",
            trainable=False,
            autocast=False,
            aggregation="none",
            name="reports",
        )

    def add(
        self,
        reports: Sequence[Report],
        accepted: tf.Tensor | None,
        taken: Collection[str] = (),
    ) -> list[str]:
        """Adds one step's reports and returns their names.

        Args:
            reports: of one step; a hook may report a name several times.
            accepted: scalar bool; the reports of a rejected step are left out, but for
                those that no hook made. `None`: the step is accepted.
            taken: the names of the model's own log entries.

        Raises:
            ValueError: when two hooks report the same name, or a name that is taken, or
                there is no more room.
        """
        owners: dict[str, object] = {}
        for report in reports:
            if report.name in taken:
                raise ValueError(
                    f"The hook {_name(report.hook)} reports {report.name!r}, a log entry "
                    "that the model has already. Call `report` with another name."
                )
            if owners.setdefault(report.name, report.hook) is not report.hook:
                raise ValueError(f"Two hooks report {report.name!r}. Give one of them a `name`.")
        if not reports:
            return []
        slots = [self._slot(report) for report in reports]
        counts = tf.stack([tf.cast(report.weight, tf.float32) for report in reports])
        values = tf.stack([report.value for report in reports]) * counts
        if accepted is not None:
            from_hook = tf.constant([report.hook is not None for report in reports])
            counted = accepted | ~from_hook
            values = tf.where(counted, values, 0.0)
            counts = tf.where(counted, counts, 0.0)
        update = tf.stack(
            [
                tf.math.unsorted_segment_sum(values, slots, self.capacity),
                tf.math.unsorted_segment_sum(counts, slots, self.capacity),
            ]
        )
        self._state.assign(self._state.value + update)
        return list(owners)

    def results(self, names: Sequence[str]) -> dict[str, tf.Tensor]:
        """Returns each entry's mean, or sum, over the steps since the last reset."""
        if not names:
            return {}
        totals, counts = tf.unstack(tf.convert_to_tensor(self._state.value))
        means = tf.math.divide_no_nan(totals, counts)
        sources = {"mean": means, "sum": totals}
        return {
            name: sources[reduction][slot]
            for name in names
            for slot, reduction in [self._entries[name]]
        }

    def names(self) -> list[str]:
        """Returns all log entries there have been."""
        return list(self._entries)

    def reset(self) -> None:
        """Begins a new epoch."""
        self._let_go()
        self._state.assign(tf.zeros((2, self.capacity)))

    def _slot(self, report: Report) -> int:
        if report.name not in self._entries:
            if len(self._entries) == self.capacity:
                self._make_room()
            if len(self._entries) == self.capacity:
                raise ValueError(
                    f"There is room for {self.capacity} log entries. The entry "
                    f"{report.name!r} of hook {_name(report.hook)} is one too many."
                )
            used = {slot for slot, _ in self._entries.values()}
            slot = next(i for i in range(self.capacity) if i not in used)
            self._entries[report.name] = (slot, report.reduction)
        if report.hook is not None:
            _owners[self].setdefault(report.name, weakref.WeakSet()).add(report.hook)
        return self._entries[report.name][0]

    def _let_go(self) -> list[int]:
        """Forgets the entries of hooks that are gone, and returns where they were."""
        gone = [name for name, owners in _owners[self].items() if not owners]
        for name in gone:
            del _owners[self][name]
        return [self._entries.pop(name)[0] for name in gone]

    def _make_room(self) -> None:
        """Lets go of entries in the middle of an epoch."""
        slots = self._let_go()
        kept = tf.constant([float(i not in slots) for i in range(self.capacity)])
        with tf.init_scope():
            self._state.assign(self._state.value * kept)


def _name(hook: GradientHook | None) -> str:
    return "(none)" if hook is None else repr(hook.name)
