"""Trials that go wrong, ended early."""

from __future__ import annotations

import math
from typing import Any

import keras
import keras_tuner


class GradientHealth(keras.callbacks.Callback):
    """Fails a trial whose training has gone wrong, with KerasTuner's own error.

    Without it a trial that went NaN runs to its end, and may be counted as completed. A
    step is bad when a gate skipped it, as the log entry `skipped_steps` says, or when it
    left the loss of the epoch NaN or infinite. A trial fails too when the last of its
    epochs ends with a loss that is not finite.

    Args:
        max_bad_steps: how many bad steps a trial may have, over all its epochs.
        losses: the log entries that must be finite at the end.

    Raises:
        TypeError: when `max_bad_steps` is no integer.
        ValueError: when `max_bad_steps` is negative.
        keras_tuner.errors.FailedTrialError: while training, see above.

    Example:

    ```python
    tuner.search(x, y, epochs=5, callbacks=[tuning.GradientHealth(max_bad_steps=10)])
    ```
    """

    def __init__(
        self, max_bad_steps: int = 10, losses: tuple[str, ...] = ("loss", "val_loss")
    ) -> None:
        if isinstance(max_bad_steps, bool) or not isinstance(max_bad_steps, int):
            raise TypeError(
                f"`max_bad_steps` must be an integer. Received: max_bad_steps={max_bad_steps!r}."
            )
        if max_bad_steps < 0:
            raise ValueError(
                "`max_bad_steps` must be zero or a positive number. "
                f"Received: max_bad_steps={max_bad_steps}."
            )
        super().__init__()
        self.max_bad_steps = max_bad_steps
        self.losses = losses
        self.num_bad_steps = 0
        self._before = 0
        self._skipped = 0
        self._not_finite = 0
        self._last_step = -1

    def on_train_begin(self, logs: Any = None) -> None:
        self._before = self._skipped = self._not_finite = 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        # The entry in the logs counts the steps of the epoch.
        self._before += self._skipped
        self._skipped = 0
        self._last_step = -1

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        logs = logs or {}
        self._skipped = int(logs.get("skipped_steps", 0))
        if not math.isfinite(float(logs.get("loss", 0.0))):
            self._not_finite += batch - self._last_step
        self._last_step = batch
        self.num_bad_steps = self._before + self._skipped + self._not_finite
        if self.num_bad_steps > self.max_bad_steps:
            raise keras_tuner.errors.FailedTrialError(
                f"{self.num_bad_steps} steps were skipped or left a loss that is not finite, "
                f"more than max_bad_steps={self.max_bad_steps}."
            )

    def on_train_end(self, logs: Any = None) -> None:
        for name in self.losses:
            value = float((logs or {}).get(name, 0.0))
            if not math.isfinite(value):
                raise keras_tuner.errors.FailedTrialError(
                    f"The training ended with {name} = {value}."
                )
