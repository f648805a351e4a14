"""The state of hooks in a saved model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from keras_tapefit.hooks import HookList
from keras_tapefit.training.recording import Recording


class SavedState(keras.Operation):
    """Saves and loads the variables of a model's hooks.

    As an attribute of a model, an `Operation` is saved with it and is otherwise
    invisible: it is no layer, adds no weights, and a plain `keras.Model` that reads the
    file passes over it.

    Args:
        hooks: the model's hooks.
        recording: the model's records, of which the number of steps is saved.
        seeds: gives the state of the model's random numbers, which Keras leaves out.
    """

    def __init__(
        self,
        hooks: HookList,
        recording: Recording,
        seeds: Callable[[], Sequence[keras.Variable]],
    ) -> None:
        super().__init__(name="tapefit_state")
        self._hooks = hooks
        self._recording = recording
        self._seeds = seeds
        self._pending: dict[str, np.ndarray] = {}

    def call(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("The state of hooks is saved, not called.")

    def save_own_variables(self, store: Any) -> None:
        for key, value in self._pending.items():
            store[key] = value
        for key, variable in self._entries().items():
            store[key] = variable.numpy()

    def load_own_variables(self, store: Any) -> None:
        # Kept until the hook is built: a model may be loaded before it has weights.
        self._pending = {key: np.asarray(store[key]) for key in store.keys()}
        self.restore_pending()

    def restore_pending(self) -> None:
        """Gives loaded values to the variables that there are by now."""
        if not self._pending:
            return
        for key, variable in self._entries().items():
            if key in self._pending:
                value = self._pending.pop(key)
                if tuple(value.shape) != tuple(variable.shape):
                    raise ValueError(
                        f"The saved state of {key!r} has shape {value.shape}, the hook's "
                        f"variable {tuple(variable.shape)}. Load the file into a model "
                        "with the same hooks."
                    )
                variable.assign(value)

    def _entries(self) -> dict[str, keras.Variable]:
        entries = {
            f"{hook.name}.{i}.{variable.name}": variable
            for hook in self._hooks
            for i, variable in enumerate(hook.variables)
        }
        if self._recording.counter is not None:
            entries["recorded_steps"] = self._recording.counter
        for i, seed in enumerate(self._seeds()):
            entries[f"seed.{i}"] = seed
        return entries
