"""The records of steps in TensorBoard."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import tensorflow as tf

from keras_tapefit.callbacks.gradient_csv import _is_chief
from keras_tapefit.callbacks.reader import (
    LayerNorms,
    RecordReader,
    check_interval,
    column_names,
)
from keras_tapefit.gradients.checks import check_bool
from keras_tapefit.training.runtime import runtime_of
from keras_tapefit.update.records import Records
from keras_tapefit.update.watch import RecordRequest


class GradientTensorBoard(RecordReader):
    """Shows gradients in TensorBoard, alongside Keras's own callback.

    Norms become scalars, with the tags `gradient_norm`, `gradient_norm_after`,
    `gradient_norm/<path>` and so on; see `GradientHistory` for the names. Distributions
    become histograms, of the true gradients of one batch, with the tag
    `gradient/<path>`. They form a separate run, `gradients`, next to the runs `train` and
    `validation` of `keras.callbacks.TensorBoard(log_dir)`.

    A step has the number that Keras's callback gives its batch: from 1, counted from the
    start of the `fit`; after a restart with `BackupAndRestore`, of the first one. With
    `steps_per_execution` of more than 1 Keras counts executions, and this callback still
    counts steps.

    Args:
        log_dir: a folder, the same as for Keras's callback.
        write_every: the number of steps from one scalar of a tag to the next.
        histograms_every: the number of steps from one histogram of a tag to the next;
            0: none.
        per_variable: whether to show norms and ratios of each variable.
        updates: whether to show update-to-weight ratios.
        per_layer: whether to show norms of each layer: of the variables it holds, with the
            tag `gradient_norm/<path of the layer>`.

    Raises:
        TypeError: when an argument is of the wrong type, or the model is not a
            `TapeModel`.
        ValueError: when a number of steps is not positive.
        ImportError: when TensorBoard is not installed.

    Example:

    ```python
    model.fit(
        x,
        y,
        verbose=0,
        callbacks=[
            keras.callbacks.TensorBoard("logs"),
            callbacks.GradientTensorBoard("logs", write_every=2, histograms_every=4),
        ],
    )
    ```
    """

    _of_training: tuple[str, ...] = ("_model", "_records", "_writer")

    def __init__(
        self,
        log_dir: Any,
        write_every: int = 10,
        histograms_every: int = 0,
        per_variable: bool = True,
        updates: bool = True,
        per_layer: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(log_dir, str | os.PathLike):
            raise TypeError(f"`log_dir` must be a path. Received: log_dir={log_dir!r}.")
        self.log_dir = log_dir
        self.write_every = check_interval("write_every", write_every, 1)
        self.histograms_every = check_interval("histograms_every", histograms_every, 0)
        self.per_variable = check_bool("per_variable", per_variable)
        self.updates = check_bool("updates", updates)
        self.per_layer = check_bool("per_layer", per_layer)
        self._layers: LayerNorms | None = None
        self._writer: Any = None
        self._start = 0

    def request(self) -> RecordRequest:
        of_variables = self.per_variable or self.per_layer
        return RecordRequest(of_variables, self.updates, self.histograms_every)

    def begin(self, records: Records, step: int) -> None:
        clock = runtime_of(self.model).clock
        # A training that continues after a restart counts on from where it began.
        if clock.first_step is None:
            clock.first_step = step
        self._start = clock.first_step
        self._layers = LayerNorms(records) if self.per_layer else None
        if _is_chief(self.model):
            _import_tensorboard()
            folder = os.path.join(os.fspath(self.log_dir), "gradients")
            self._writer = tf.summary.create_file_writer(folder)

    def take(self, steps: np.ndarray, rows: np.ndarray) -> None:
        assert self._records is not None
        if self._writer is None:
            return
        names = column_names(self._records, RecordRequest(self.per_variable, self.updates))
        places = {name: self._records.columns.index(name) for name in names}
        if self._layers is not None:
            first = len(self._records.columns)
            places.update((name, first + i) for i, name in enumerate(self._layers.names))
            rows = np.concatenate([rows, self._layers.of(rows)], axis=1)
        with self._writer.as_default():
            for step, row in zip(steps - self._start + 1, rows, strict=True):
                if step % self.write_every == 0:
                    for name, place in places.items():
                        tf.summary.scalar(name, row[place], step=int(step))
            if self.histograms_every:
                self._write_histograms(int(steps[0]))
        self._writer.flush()

    def _write_histograms(self, start: int) -> None:
        assert self._records is not None
        for step, values in self._records.read_histograms(start):
            if (step + 1) % self.histograms_every:
                # Another callback asked for this one.
                continue
            for path, histogram in zip(self._records.paths, values, strict=True):
                # NaN: the variable is frozen. All zero: no value was finite.
                if histogram[2:].sum() > 0:
                    _write_histogram(f"gradient/{path}", histogram, step - self._start + 1)

    def detach(self) -> None:
        super().detach()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _is_due(self) -> bool:
        # Often enough to watch the page while the model trains.
        return super()._is_due() or self._num_unread >= self.write_every


def _import_tensorboard() -> Any:
    try:
        from tensorboard.plugins.histogram import metadata
    except ImportError as error:
        raise ImportError(
            "`GradientTensorBoard` needs TensorBoard: `pip install tensorboard`."
        ) from error
    return metadata


def _write_histogram(tag: str, histogram: np.ndarray, step: int) -> None:
    """Writes counts in bins: `tf.summary.histogram` would want all the values."""
    low, high, counts = float(histogram[0]), float(histogram[1]), histogram[2:]
    edges = np.linspace(low, high, len(counts) + 1)
    metadata = _import_tensorboard().create_summary_metadata(None, None)
    # In TensorFlow's own form of the same message.
    metadata = tf.compat.v1.SummaryMetadata.FromString(metadata.SerializeToString())
    table = np.stack([edges[:-1], edges[1:], counts], axis=1)
    tf.summary.write(tag, tf.constant(table, tf.float64), step=step, metadata=metadata)
