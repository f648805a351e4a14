"""Freezing by schedule: what hooks say for this epoch and step."""

from __future__ import annotations

from typing import Any

import keras

from keras_tapefit.training.runtime import Runtime
from keras_tapefit.update import trainable


class Clock(keras.callbacks.Callback):
    """Knows the epoch, and freezes what hooks say.

    Args:
        runtime: the private side of the model.
    """

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        self.runtime = runtime
        self.epoch = 0
        self._scheduled: set[int] = set()
        self._followed: set[Any] = set()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.epoch = epoch

    def follow(self) -> None:
        """Freezes and unfreezes, before an execution."""
        runtime = self.runtime
        if not runtime.hooks and not self._scheduled:
            return
        counted = any(hook.uses_step_count for hook in runtime.hooks)
        steps = runtime.step_count.so_far(runtime.optimizer) if counted else 0
        wanted: set[int] = set()
        held: set[int] = set()
        for hook in runtime.hooks:
            if hook not in self._followed:
                held.update(hook.held_positions())
            wanted.update(hook.frozen_positions(self.epoch, steps))
        self._followed = set(runtime.hooks)
        if wanted == self._scheduled and not held:
            return
        self._scheduled |= held
        candidates = runtime.candidates()
        released = [candidates[i] for i in sorted(self._scheduled - wanted)]
        frozen = [candidates[i] for i in sorted(wanted)]
        self._scheduled = wanted
        if released:
            trainable.set_trainable(runtime.model, released, True)
        if frozen:
            trainable.set_trainable(runtime.model, frozen, False)
