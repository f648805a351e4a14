"""One list of all that outlives a step and that Keras does not keep.

What is in it is saved, loaded, undone and found by name; a test holds that nothing else
changes in a step.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from keras_tapefit.update import trainable


class State(keras.Operation):
    """The state of a model by stable names: hooks, windows, counters, seeds, log entries.

    As an attribute of a model, an `Operation` is saved with it and is otherwise
    invisible: it is no layer, adds no weights, and a plain `keras.Model` that reads the
    file passes over it.

    Args:
        runtime: the private side of the model.
    """

    def __init__(self, runtime: Any) -> None:
        super().__init__(name="tapefit_state")
        self._runtime = runtime
        self._pending: dict[str, np.ndarray] = {}

    def call(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("State is saved, not called.")

    def variables(self) -> dict[str, Any]:
        """Returns every variable of ours by its name, those that are not saved too."""
        runtime = self._runtime
        found = self._saved()
        for hook in runtime.hooks:
            found.update((f"{hook.name}.{n}", v) for n, v in hook._number_variables.items())
        for name, window in runtime.windows.named():
            found.update((f"{name}.updates.{i}", v) for i, v in enumerate(window.updates))
        if runtime.logs.made is not None:
            found["log_entries"] = runtime.logs.made.state
        records = runtime.recording.records
        if records is not None:
            found.update((f"records.{v.name}", v) for v in records.variables)
        return found

    def _saved(self) -> dict[str, Any]:
        runtime = self._runtime
        found = {
            f"{hook.name}.{i}.{variable.name}": variable
            for hook in runtime.hooks
            for i, variable in enumerate(hook.variables)
        }
        if runtime.recording.counter is not None:
            found["recorded_steps"] = runtime.recording.counter
        if runtime.step_count.variable is not None:
            found["training_steps"] = runtime.step_count.variable
        for i, seed in enumerate(trainable.seeds(runtime.model)):
            found[f"seed.{i}"] = seed
        for name, window in runtime.windows.named():
            found.update((f"{name}.{key}", v) for key, v in window.variables.items())
        return found

    def changed_by_forward(self) -> list[Any]:
        """Returns what a forward pass in training mode may change: seeds, statistics."""
        model = self._runtime.model
        trained = {id(v) for v in self._runtime.candidates()}
        everything = [*model.variables, *trainable.recurrent_states(model)]
        return list({id(v): v for v in everything if id(v) not in trained}.values())

    def undone_variables(self, everything: bool = False) -> list[Any]:
        """Returns what a rejected step must leave as it was.

        The built-in step changes weights and optimizer by its update only, which a branch
        guards, and windows likewise.

        Args:
            everything: for a custom step, which may change any variable of the model, at
                any place and more than once.
        """
        runtime, model = self._runtime, self._runtime.model
        found = [
            *self.changed_by_forward(),
            *model.metrics_variables,
            *(v for metric in model.metrics for v in metric.variables),
        ]
        if everything:
            found += runtime.candidates()
            for optimizer in runtime.optimizers():
                found += optimizer.variables
            for _, window in runtime.windows.named():
                found += window.variables.values()
        if everything or not runtime.has_window:
            # With a window the hooks run at its end, and are put back there.
            found += runtime.hooks.undone_variables()
        return list({id(v): v for v in found}.values())

    def save_own_variables(self, store: Any) -> None:
        for key, value in self._pending.items():
            store[key] = value
        for _, window in self._runtime.windows.named():
            window.gather()
        for key, variable in self._saved().items():
            store[key] = variable.numpy()

    def load_own_variables(self, store: Any) -> None:
        given = {key: np.asarray(store[key]) for key in store.keys()}
        self._check(given)
        # Kept until the hook is built: a model may be loaded before it has weights.
        self._pending = given
        self._runtime.windows.loaded()
        self.restore_pending()

    def _check(self, given: dict[str, np.ndarray]) -> None:
        for key, variable in self._saved().items():
            if key in given and tuple(given[key].shape) != tuple(variable.shape):
                raise ValueError(
                    f"The saved state of {key!r} has shape {given[key].shape}, the hook's "
                    f"variable {tuple(variable.shape)}. Load the file into a model with the "
                    "same hooks."
                )

    def pending_of(self, name: str) -> list[str]:
        """Returns what is loaded and not given yet, of the names that begin so."""
        start = f"{name}."
        return [key.removeprefix(start) for key in self._pending if key.startswith(start)]

    def restore_pending(self) -> None:
        """Gives loaded values to the variables that exist by now."""
        if not self._pending:
            return
        self._check(self._pending)
        for key, variable in self._saved().items():
            if key in self._pending:
                variable.assign(self._pending.pop(key))
