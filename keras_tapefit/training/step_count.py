"""The number of training steps, for hooks that go by steps and not by updates."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_tapefit.update.window import window_steps


class StepCount:
    """Counts steps where the optimizer's own count does not: in windows, or at request."""

    def __init__(self) -> None:
        self.variable: Any = None

    def prepare(self, optimizer: Any) -> None:
        """Makes the count where it is missing; it goes on from the optimizer's."""
        if self.variable is None:
            built = optimizer is not None and optimizer.built
            start = int(optimizer.iterations.numpy()) if built else 0
            self.variable = keras.Variable(
                np.int64(start * (window_steps(optimizer) if built else 1)),
                dtype="int64",
                trainable=False,
                autocast=False,
                aggregation="none",
                name="training_steps",
            )

    def add(self, accepted: tf.Tensor | None) -> None:
        """Counts a step; a rejected one never was."""
        if self.variable is not None:
            counted = 1 if accepted is None else tf.cast(accepted, tf.int64)
            self.variable.assign(self.variable.value + counted)

    def so_far(self, optimizer: Any) -> int:
        """Returns the number of steps; waits for the device."""
        if self.variable is not None:
            return int(self.variable.numpy())
        return int(optimizer.iterations.numpy()) if optimizer is not None else 0
