"""Epoch means of what hooks report, kept outside the model's metrics."""

from collections.abc import Collection, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_tapefit.hooks.step import LogEntry

# Owns what was restored in the middle of an epoch, until its hook reports it again.
_RESTORED = object()


class LogEntries:
    """Sums and counts of reported scalars, one variable for all.

    Args:
        capacity: the number of log entries there is room for.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._entries: dict[str, tuple[int, str]] = {}
        self._owners: dict[str, Any] = {}
        self._of_training: set[str] = set()
        self._of_validation: set[str] = set()
        self.state = keras.Variable(
            tf.zeros((capacity, 2)),
            dtype="float32",
            trainable=False,
            autocast=False,
            aggregation="none",
            name="log_entries",
        )

    def add(
        self,
        entries: Sequence[LogEntry],
        accepted: tf.Tensor | None,
        taken: Collection[str] = (),
        validation: bool = False,
    ) -> None:
        """Adds one step's entries.

        Args:
            entries: of one step; a hook may report a name several times.
            accepted: scalar bool; those of a rejected step are left out, but for
                what no hook made. `None`: the step is accepted.
            taken: the names of the model's own log entries.
            validation: whether the step is one of `evaluate`.

        Raises:
            ValueError: when two hooks report the same name, a name is taken, or there is
                no more room.
        """
        owners: dict[str, object] = {}
        for entry in entries:
            if entry.name in taken:
                raise ValueError(
                    f"The hook {entry.hook.name!r} reports {entry.name!r}, which is a log "
                    "entry of the model itself. Choose another name."
                )
            if owners.setdefault(entry.name, entry.hook) is not entry.hook:
                raise ValueError(f"Two hooks report {entry.name!r}. Give one of them a `name`.")
        if not entries:
            return
        slots = [self._slot(entry) for entry in entries]
        names = self._of_validation if validation else self._of_training
        names.update(entry.name for entry in entries)
        counts = tf.stack([tf.cast(entry.weight, tf.float32) for entry in entries])
        values = tf.stack([entry.value for entry in entries]) * counts
        rows = tf.stack([values, counts], axis=1)
        if accepted is not None:
            from_hook = tf.constant([[entry.hook is not None] for entry in entries])
            rows = tf.where(accepted | ~from_hook, rows, 0.0)
        self.state.value.scatter_add(tf.IndexedSlices(rows, tf.constant(slots)))

    def results(self, names: Sequence[str]) -> dict[str, tf.Tensor]:
        """Returns each entry's mean, or sum, over the steps since the last reset."""
        if not names:
            return {}
        totals, counts = tf.unstack(tf.convert_to_tensor(self.state.value), axis=1)
        # The mean of no steps is NaN.
        means = totals / counts
        sources = {"mean": means, "sum": totals}
        return {
            name: sources[reduction][slot]
            for name in names
            for slot, reduction in [self._entries[name]]
        }

    def verdicts(self) -> tuple[int, int]:
        """Returns how many steps counted since the last reset, and how many were skipped."""
        if "skipped_steps" not in self._entries:
            return 0, 0
        slot = self._entries["skipped_steps"][0]
        copies = getattr(self.state.value, "values", [self.state.value])
        skipped, steps = copies[0].numpy()[slot]
        return int(steps - skipped), int(skipped)

    def names(self, owners: Collection[Any], validation: bool = False) -> list[str]:
        """Returns the log entries of some hooks; `None` stands for those of no hook."""
        ids = {id(owner) for owner in [*owners, _RESTORED]}
        known = self._of_validation if validation else self._of_training
        return [name for name, owner in self._owners.items() if id(owner) in ids and name in known]

    def keep(self, owners: Collection[Any]) -> None:
        """Lets go of the log entries of all other hooks."""
        kept = {*self.names(owners), *self.names(owners, validation=True)}
        self._drop(set(self._owners) - kept)

    def values(self) -> tuple[dict[str, str], np.ndarray]:
        """Returns the reduction of each entry, and their sums and counts, `[2, entries]`."""
        slots = [slot for slot, _ in self._entries.values()]
        values = np.asarray(keras.ops.convert_to_numpy(self.state))[slots].T
        return {name: reduction for name, (_, reduction) in self._entries.items()}, values

    def restore(self, reductions: dict[str, str], values: np.ndarray) -> None:
        """Puts back what `values` gave; the hooks of the names may report them later."""
        state = np.zeros((self.capacity, 2), "float32")
        for (name, reduction), column in zip(reductions.items(), values.T, strict=True):
            if name not in self._entries:
                used = {slot for slot, _ in self._entries.values()}
                slot = next(s for s in range(self.capacity) if s not in used)
                self._entries[name], self._owners[name] = (slot, reduction), _RESTORED
            state[self._entries[name][0]] = column
        self._of_training.update(reductions)
        self.state.assign(state)

    def reset(self) -> None:
        """Begins a new epoch."""
        self._drop({name for name, owner in self._owners.items() if owner is _RESTORED})
        self.state.assign(tf.zeros((self.capacity, 2)))

    def _drop(self, names: set[str]) -> None:
        for name in names:
            del self._owners[name], self._entries[name]
        self._of_training -= names
        self._of_validation -= names

    def _slot(self, entry: LogEntry) -> int:
        known = self._entries.get(entry.name)
        if known is not None and self._owners[entry.name] is entry.hook:
            return known[0]
        used = {slot for name, (slot, _) in self._entries.items() if name != entry.name}
        free = next((slot for slot in range(self.capacity) if slot not in used), None)
        if free is None:
            raise ValueError(
                f"There is room for {self.capacity} log entries. The entry "
                f"{entry.name!r} of hook {entry.hook.name!r} is one too many."
            )
        # An entry of another hook's of this name keeps its slot, if there is one.
        slot = free if known is None else known[0]
        self._entries[entry.name] = (slot, entry.reduction)
        self._owners[entry.name] = entry.hook
        return slot
