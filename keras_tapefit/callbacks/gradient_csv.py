"""The records of all steps in a file."""

from __future__ import annotations

import csv
import os
from typing import Any

import numpy as np
import tensorflow as tf

from keras_tapefit.callbacks.reader import LayerNorms, RecordReader, column_names
from keras_tapefit.gradients.checks import check_bool
from keras_tapefit.update.records import Records
from keras_tapefit.update.watch import RecordRequest


class GradientCSV(RecordReader):
    """Writes a record of every step to a CSV file, as `GradientHistory` keeps it.

    Rows are written after each execution, so a crash loses none. With
    `keras.callbacks.BackupAndRestore` in the same list the file continues where the
    restored training continues: rows of repeated steps are replaced, and none is missing.
    If `BackupAndRestore` has a `save_freq` in batches, put it after this callback. A model
    that has not been trained yet starts a new file.

    Of several workers only the chief writes.

    Args:
        path: of the file.
        per_variable: whether to write norms and ratios of each variable.
        updates: whether to write update-to-weight ratios.
        per_layer: whether to write the norms of each layer: of the variables it holds, as
            `gradient_norm/<path of the layer>`.

    Raises:
        TypeError: when an argument is of the wrong type, or the model is not a
            `TapeModel`.
        ValueError: when the training continues, and the file has other columns.

    Example:

    ```python
    model.fit(x, y, verbose=0, callbacks=[callbacks.GradientCSV("gradients.csv")])
    ```
    """

    _of_training: tuple[str, ...] = ("_model", "_records", "_file")
    _file: Any = None

    def __init__(
        self,
        path: Any,
        per_variable: bool = False,
        updates: bool = False,
        per_layer: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"`path` must be a path. Received: path={path!r}.")
        self.path = path
        self.per_variable = check_bool("per_variable", per_variable)
        self.updates = check_bool("updates", updates)
        self.per_layer = check_bool("per_layer", per_layer)
        self._places: list[int] = []
        self._layers: LayerNorms | None = None

    def request(self) -> RecordRequest:
        return RecordRequest(self.per_variable or self.per_layer, self.updates)

    def begin(self, records: Records, step: int) -> None:
        names = column_names(records, RecordRequest(self.per_variable, self.updates))
        self._places = [records.columns.index(name) for name in names]
        self._layers = LayerNorms(records) if self.per_layer else None
        names += [] if self._layers is None else self._layers.names
        if not _is_chief(self.model):
            return
        header = ["step", "epoch", *names]
        kept = _rows_before(self.path, step, header)
        unfinished = f"{os.fspath(self.path)}.unfinished"
        with open(unfinished, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *kept])
        os.replace(unfinished, self.path)
        self._file = open(self.path, "a", newline="", encoding="utf-8")

    def take(self, steps: np.ndarray, rows: np.ndarray) -> None:
        if self._file is None:
            return
        writer = csv.writer(self._file)
        chosen = rows[:, self._places]
        if self._layers is not None:
            chosen = np.concatenate([chosen, self._layers.of(rows)], axis=1)
        for step, row in zip(steps, chosen, strict=True):
            # The shortest text that reads back as the same float32.
            writer.writerow([step, self._epoch, *map(str, row)])
        self._file.flush()

    def detach(self) -> None:
        super().detach()
        self._close()

    def _is_due(self) -> bool:
        return True

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __del__(self) -> None:
        # A training that ended with an error.
        self._close()


def _is_chief(model: Any) -> bool:
    strategy = model.distribute_strategy
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        return True
    return strategy.cluster_resolver.task_id in (0, None)


def _rows_before(path: Any, step: int, header: list[str]) -> list[list[str]]:
    """Returns the rows of a file that a training continues from.

    Raises:
        ValueError: when there are any, and the file has other columns, or a row that is none.
    """
    if step == 0 or not os.path.exists(path):
        return []
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        text = file.read()
    # A row without an end was being written when the training was interrupted.
    rows = list(csv.reader(text[: text.rfind("\n") + 1].splitlines()))
    if not rows:
        return []
    if rows[0] != header:
        raise ValueError(
            f"The training continues at step {step}, and the file {os.fspath(path)!r} has "
            "other columns. Move it away, or pass the same `per_variable`, `updates` "
            "and `per_layer` as before."
        )
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(header) or not (row[0].isdecimal() and row[1].isdecimal()):
            raise ValueError(
                f"The training continues at step {step}, and line {number} of the file "
                f"{os.fspath(path)!r} is no record of a step. Take it out, or move the file "
                f"away. Received: {','.join(row)[:80]!r}."
            )
    return [row for row in rows[1:] if int(row[0]) < step]
