"""The position in a training: freezing by schedule, and the step at which to continue."""

from __future__ import annotations

import json
from typing import Any

import keras
import numpy as np

from keras_tapefit.training import keras_trainer
from keras_tapefit.training.runtime import Runtime
from keras_tapefit.update import trainable


class Clock(keras.callbacks.Callback):
    """Knows the epoch and the batch, and freezes what hooks say.

    Where `BackupAndRestore` restored the model in the middle of an epoch, the batches that
    were trained on already are passed over.

    Args:
        runtime: the private side of the model.

    Attributes:
        num_passed_over: the number of batches that are not to be trained on again.
        first_step: the number of the first step of this `fit`, of the one before where
            this one continues it; `None` where no callback asked.
        restores: whether `BackupAndRestore` is among the callbacks.
    """

    def __init__(self, runtime: Runtime) -> None:
        super().__init__()
        self.runtime = runtime
        self.epoch = 0
        self.num_passed_over = 0
        self.first_step: int | None = None
        self.restores = False
        self._done: tuple[int, int] | None = None
        self._restored = (0, 0)
        self._scheduled: set[int] = set()
        self._followed: set[Any] = set()

    @property
    def progress(self) -> tuple[int, int, int] | None:
        """Epochs done, batches of the next one done, `first_step` or -1; `None` outside `fit`."""
        if self._done is None:
            return None
        return *self._done, -1 if self.first_step is None else self.first_step

    def values(self) -> dict[str, np.ndarray]:
        """Returns what a file says of a training that has not ended."""
        found = {"place": np.array(self.progress, "int64")}
        for i, variable in enumerate(self.model.metrics_variables):
            found[f"metric.{i}"] = keras.ops.convert_to_numpy(variable)
        reductions, log_values = self.runtime.logs.entries.values()
        found["log_entries"] = np.frombuffer(json.dumps(reductions).encode(), "uint8")
        found["log_values"] = log_values
        return found

    def begin(self, restores: bool) -> None:
        """Begins a `fit`, before its callbacks do."""
        self.restores, self.first_step = restores, None
        self.num_passed_over, self._restored, self._done = 0, (0, 0), None
        self.runtime.state.progress = None

    def on_train_begin(self, logs: Any = None) -> None:
        # The last of all callbacks: one of them may have restored the model.
        given = self.runtime.state.progress if self.restores else None
        if given is None or self.runtime.has_trained:
            # Of a `fit` that was interrupted in this process, Keras repeats the epoch.
            return
        epoch, self.num_passed_over, first_step = map(int, given["place"])
        self._restored = epoch, self.num_passed_over
        self.first_step = None if first_step < 0 else first_step
        keras_trainer.resume_at(self.model, epoch)
        if self.num_passed_over:
            # The logs of this epoch are of all its batches.
            for i, variable in enumerate(self.model.metrics_variables):
                if f"metric.{i}" in given:
                    variable.assign(given[f"metric.{i}"])
            reductions = json.loads(given["log_entries"].tobytes())
            self.runtime.logs.entries.restore(reductions, given["log_values"])

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.epoch = epoch
        self._done = (epoch, 0)
        self.runtime.has_trained = True

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        # Other callbacks, which may save, come before this one at the end of a batch.
        done = self.epoch, batch + self.model.steps_per_execution
        self._done = max(done, self._restored)

    def end_epoch(self) -> None:
        """Ends an epoch, before callbacks do."""
        if self._done is not None:
            self._done = (self.epoch + 1, 0)

    def on_train_end(self, logs: Any = None) -> None:
        self._done = None

    def resumes_epoch(self) -> bool:
        """Whether this is the middle of an epoch that was begun before the restart."""
        return self.num_passed_over > 0

    def pass_over(self, iterator: Any) -> None:
        """Takes the batches of one execution, which were trained on already."""
        batches, number = iter(iterator), self.model.steps_per_execution
        if self.num_passed_over % number:
            raise ValueError(
                f"The backup was made after {self.num_passed_over} batches of an epoch, so "
                "`steps_per_execution` must divide that number. Received: "
                f"steps_per_execution={number}. Compile with what it was when the backup was made."
            )
        self.num_passed_over -= number
        for _ in range(number):
            next(batches)

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
