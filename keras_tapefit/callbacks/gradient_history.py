"""The records of all steps in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from keras_tapefit.callbacks.diagnosis import Report, diagnose, summary_of
from keras_tapefit.callbacks.reader import RecordReader, column_names
from keras_tapefit.gradients import Targets, matching
from keras_tapefit.gradients.checks import check_bool
from keras_tapefit.gradients.targets import check_targets
from keras_tapefit.hooks import SkipNonFinite
from keras_tapefit.training.runtime import runtime_of
from keras_tapefit.update.records import Records
from keras_tapefit.update.watch import RecordRequest

_MAX_WEIGHTS = 1000


class GradientHistory(RecordReader):
    """Keeps a record of every step: gradients before and after hooks, updates, verdicts.

    The gradients are those of the training batches, summed over replicas and without
    loss scale. Every step has a record, rejected ones included, with any
    `steps_per_execution`, under XLA and on replicas. Fetching waits for the device once in
    some hundred steps. The training is the same with and without it, to float32 rounding.

    It reads like a data frame: `history[name]` is an array with one entry per step,
    `len(history)` is the number of steps, and iterating yields the names:

    | name | value |
    |---|---|
    | `step` | its number in the life of the model, from 0 |
    | `epoch` | of `fit`, from 0 |
    | `loss` | of the batch, regularization included |
    | `learning_rate` | at this step |
    | `gradient_norm` | the global norm before the hooks |
    | `gradient_norm_after` | the global norm after the hooks |
    | `skipped` | whether the step was rejected: by a gate or for an overflow |
    | `update_ratio` | `‖v_new − v_old‖ / ‖v_old‖` over all variables in training |
    | `gradient_norm/<path>` | likewise of each variable, NaN while it is frozen |

    and `gradient_norm_after/<path>`, `update_ratio/<path>`. While gradients accumulate,
    values after the hooks are NaN except at steps that end a window. A later `fit` of the
    same model adds to the records; a resumed one replaces the steps that it repeats.

    Args:
        per_variable: whether to keep norms and ratios of each variable.
        updates: whether to keep the ratios.
        weights: variables whose values after each step to keep, as `weight/<path>`:
            a layer, a variable, a predicate, a glob on `variable.path`, or a list of
            these. `None`: none.

    Raises:
        TypeError: when an argument is of the wrong type, or the model is not a `TapeModel`.
        ValueError: when `weights` has more than 1000 elements.

    Example:

    ```python
    history = callbacks.GradientHistory()
    model.fit(x, y, epochs=2, verbose=0, callbacks=[history])
    history["gradient_norm"].max()
    print(history.report())
    ```
    """

    def __init__(
        self, per_variable: bool = True, updates: bool = True, weights: Targets = None
    ) -> None:
        super().__init__()
        check_targets(weights)
        self.per_variable = check_bool("per_variable", per_variable)
        self.updates = check_bool("updates", updates)
        self.weights = weights
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._chunks: list[dict[str, np.ndarray]] = []

    def request(self) -> RecordRequest:
        return RecordRequest(self.per_variable, self.updates, weights=self._positions())

    def begin(self, records: Records, step: int) -> None:
        if self.shapes not in ({}, records.shapes):
            self._chunks = []
        self.shapes = dict(records.shapes)
        self._chunks = [
            {name: values[chunk["step"] < step] for name, values in chunk.items()}
            for chunk in self._chunks
        ]

    def take(self, steps: np.ndarray, rows: np.ndarray) -> None:
        assert self._records is not None
        places = {name: i for i, name in enumerate(self._records.columns)}
        wanted = column_names(self._records, self.request())
        chunk = {"step": steps, "epoch": np.full(len(steps), self._epoch)}
        chunk.update((name, rows[:, places[name]]) for name in wanted)
        chunk["skipped"] = chunk["skipped"] > 0
        self._chunks.append(chunk)

    def to_numpy(self) -> dict[str, np.ndarray]:
        """Returns the records so far, one array per name."""
        self.drain()
        if len(self._chunks) > 1:
            self._chunks = [_joined(self._chunks)]
        return dict(self._chunks[0]) if self._chunks else {}

    def to_pandas(self) -> Any:
        """Returns the records so far as a `pandas.DataFrame`, indexed by step.

        Raises:
            ImportError: when pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "`to_pandas` needs pandas: `pip install pandas`. `to_numpy` does not."
            ) from error
        return pandas.DataFrame(self.to_numpy() or {"step": np.zeros(0, int)}).set_index("step")

    def report(self) -> Report:
        """Describes in words what is wrong with the gradients, and which hooks would help.

        Returns:
            A `Report`, which prints as text; `docs/see_the_gradients.md` lists its
            thresholds and their sources.
        """
        return diagnose(self.to_numpy(), self.shapes, self._located())

    def _located(self) -> str | None:
        if self.model is None:
            return None
        found = [h.located for h in self.model.gradient_hooks if isinstance(h, SkipNonFinite)]
        return next((text for text in found if text is not None), None)

    def keys(self) -> Any:
        """The names of the arrays."""
        return self.to_numpy().keys()

    def items(self) -> Any:
        """The names, each with its array."""
        return self.to_numpy().items()

    def __getitem__(self, name: str) -> np.ndarray:
        records = self.to_numpy()
        if name not in records:
            raise KeyError(f"{name!r} is not recorded. There are: {', '.join(records) or 'none'}.")
        return records[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.to_numpy())

    def __len__(self) -> int:
        return len(self.to_numpy().get("step", ()))

    def __contains__(self, name: object) -> bool:
        return name in self.to_numpy()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {summary_of(self.to_numpy())}>"

    def __bool__(self) -> bool:
        return True

    def _positions(self) -> tuple[int, ...]:
        if self.weights is None:
            return ()
        variables = runtime_of(self.model).candidates()
        positions = tuple(matching(self.weights, variables))
        size = sum(int(np.prod(variables[i].shape)) for i in positions)
        if size > _MAX_WEIGHTS:
            raise ValueError(
                f"`weights` may have {_MAX_WEIGHTS} elements in all, for one column each. "
                f"Received: weights={self.weights!r}, which has {size}."
            )
        return positions


def _joined(chunks: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns the chunks joined; NaN if a chunk lacks a name."""
    names = dict.fromkeys(name for chunk in chunks for name in chunk)
    return {
        name: np.concatenate(
            [
                chunk[name] if name in chunk else np.full(len(chunk["step"]), np.nan)
                for chunk in chunks
            ]
        )
        for name in names
    }
