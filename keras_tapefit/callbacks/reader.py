"""The shared part of the callbacks: requesting records from a model, and fetching them."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from keras_tapefit.gradients.checks import check_integer
from keras_tapefit.gradients.layers import layer_path
from keras_tapefit.training.runtime import runtime_of
from keras_tapefit.training.trainer import TapeTrainer
from keras_tapefit.update.records import Records
from keras_tapefit.update.watch import RecordRequest


class RecordReader(keras.callbacks.Callback):
    """Base class of callbacks that get a record of every step.

    Subclasses implement `request` and `take`.
    """

    # What belongs to one training and is not copied with the callback.
    _of_training: tuple[str, ...] = ("_model", "_records")

    def __init__(self) -> None:
        super().__init__()
        self._records: Records | None = None
        self._position = 0
        self._epoch = 0
        self._num_unread = 0

    def request(self) -> RecordRequest:
        """Returns what to record."""
        raise NotImplementedError

    def begin(self, records: Records, step: int) -> None:
        """Called before the first step of a training, whose number is `step`."""

    def take(self, steps: np.ndarray, rows: np.ndarray) -> None:
        """Takes the records of steps.

        Args:
            steps: their numbers.
            rows: of shape `[num_steps, num_columns]`.
        """
        raise NotImplementedError

    def set_model(self, model: Any) -> None:
        if not isinstance(model, TapeTrainer):
            raise TypeError(
                f"{type(self).__name__} needs a `TapeModel`, whose steps can be recorded. "
                f"Received: a model of type {type(model).__name__}. Make one of it with "
                "`TapeModel.from_model(model)`, and compile that."
            )
        if self.model is not model:
            # A training of another model may have broken off.
            self.detach()
        super().set_model(model)

    def on_train_begin(self, logs: Any = None) -> None:
        self.detach()
        runtime_of(self.model).recording.ask(self, self.request())

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._begin()
        self._epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        # A custom loop may have no epochs.
        self._begin()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._begin(after_batch=True)
        self._num_unread += self.model.steps_per_execution
        if self._is_due():
            self.drain()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.drain()

    def on_train_end(self, logs: Any = None) -> None:
        self.detach()

    def detach(self) -> None:
        """Fetches what is left, and ends the request."""
        self.drain()
        # What is written from now on is not for this callback.
        self._records = None
        if self.model is not None:
            runtime_of(self.model).recording.release(self)

    def drain(self) -> None:
        """Fetches the records there are."""
        if self._records is None:
            return
        steps, rows = self._records.read(self._position)
        self._num_unread = 0
        if len(steps):
            self.take(steps, rows)
            self._position = int(steps[-1]) + 1

    def _is_due(self) -> bool:
        """Whether the next execution may overwrite what was not fetched."""
        if self._records is None:
            return False
        return self._num_unread + self.model.steps_per_execution > self._records.size

    def _begin(self, after_batch: bool = False) -> None:
        if self._records is not None:
            return
        # After all callbacks have begun: one of them may have restored the model.
        runtime = runtime_of(self.model)
        runtime.prepare()
        recording = runtime.recording
        if recording.records is None:
            return
        # What the first batch built has records since then, and these are of this training.
        num_written = recording.records.count() if after_batch else 0
        recording.begin(runtime.step_count.so_far(runtime.optimizer))
        self._records, self._num_unread = recording.records, 0
        self._position = recording.records.count() - num_written
        self.begin(recording.records, self._position)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        for name in self._of_training:
            state[name] = None
        return state


def column_names(records: Records, request: RecordRequest) -> list[str]:
    """Returns the columns that a request asked for; others may have asked for more."""
    wanted = []
    for name in records.columns:
        kind, _, path = name.partition("/")
        if name in records.entries:
            keep = True
        elif kind == "weight":
            variables = [records.paths[i] for i in request.weights]
            keep = any(path == p or path.startswith(f"{p}[") for p in variables)
        else:
            keep = (request.per_variable or not path) and (
                request.updates or kind != "update_ratio"
            )
        if keep:
            wanted.append(name)
    return wanted


class LayerNorms:
    """Norms of layers, made of those of their variables.

    Args:
        records: with norms of each variable.
    """

    def __init__(self, records: Records) -> None:
        self._places: dict[str, list[int]] = {}
        for i, name in enumerate(records.columns):
            kind, _, path = name.partition("/")
            if path and kind in ("gradient_norm", "gradient_norm_after"):
                self._places.setdefault(f"{kind}/{layer_path(path)}", []).append(i)

    @property
    def names(self) -> list[str]:
        """The names of the columns."""
        return list(self._places)

    def of(self, rows: np.ndarray) -> np.ndarray:
        """Returns the columns for records of shape `[num_steps, num_columns]`.

        What is frozen is NaN, and counts for nothing in a layer with other variables.
        """
        found = []
        for places in self._places.values():
            values = rows[:, places].astype("float64")
            frozen = np.isnan(values)
            norms = np.sqrt(np.sum(np.where(frozen, 0.0, values) ** 2, axis=1))
            found.append(np.where(frozen.all(axis=1), np.nan, norms))
        return np.stack(found, axis=1).astype("float32")


def check_interval(name: str, value: Any, minimum: int) -> int:
    """Returns `value`, or raises where it is no number of steps."""
    check_integer(name, value)
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}. Received: {name}={value}.")
    return value
