"""The log entries of hooks in an epoch, made when the model has weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_tapefit.hooks.log_entries import LogEntries


class EpochLogs:
    """The log entries of an epoch.

    Args:
        owners: returns whose log entries count now; `None` among them for the number of
            skipped steps.
        has_gate: returns whether a hook may skip steps.
        size: returns how many log entries there is room for.
        scope: returns the scope in which variables are made.
    """

    def __init__(
        self,
        owners: Callable[[], list[Any]],
        has_gate: Callable[[], bool],
        size: Callable[[], int],
        scope: Callable[[], Any],
    ) -> None:
        self._owners = owners
        self._has_gate = has_gate
        self._size = size
        self._scope = scope
        self.made: LogEntries | None = None

    def prepare(self) -> None:
        """Makes the entries where they are missing."""
        if self.made is None:
            with tf.init_scope(), self._scope():
                self.made = LogEntries(self._size())

    @property
    def entries(self) -> LogEntries:
        """The log entries of the epoch."""
        self.prepare()
        assert self.made is not None
        return self.made

    def names(self, validation: bool = False) -> list[str]:
        """Returns the names of the log entries that are reported now."""
        return [] if self.made is None else self.made.names(self._owners(), validation)

    def results(self) -> dict[str, tf.Tensor]:
        """Returns the log entries so far."""
        return {} if self.made is None else self.made.results(self.names())

    def counted_steps(self) -> tuple[int, int]:
        """Returns how many steps of this epoch counted, and how many were skipped."""
        return (0, 0) if self.made is None else self.made.verdicts()

    def of_counted_steps(self, results: dict[str, Any]) -> dict[str, Any]:
        """Returns the epoch's logs: NaN, the mean of nothing, where all steps were skipped."""
        counted, skipped = self.counted_steps()
        if not skipped:
            return results
        # A loss scale finds its size by overflows; those need no word.
        if self._has_gate() and skipped > counted:
            warnings.warn(
                f"{skipped} of {skipped + counted} steps of this epoch were skipped: their "
                "gradients were not finite, or a gate rejected them.",
                stacklevel=5,
            )
        return dict.fromkeys(results, float("nan")) if counted == 0 else results

    def reset(self) -> None:
        """Begins an epoch."""
        if self.made is not None:
            self.made.reset()
