"""One list of all that outlives a step and that Keras does not keep.

What is in it is saved, loaded, undone and found by name; a test holds that nothing else
changes in a step.
"""

from __future__ import annotations

import warnings
from typing import Any

import keras
import numpy as np

from keras_tapefit.training import files, strategies
from keras_tapefit.update import trainable

# After the name of a hook that had no state yet.
_NEW = ".new"
_SLASH = "%2F"


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
        # Loaded, and not given yet: the hook may not be built.
        self.pending: dict[str, np.ndarray] = {}
        # The names of hooks whose state a file should have had.
        self.awaited: set[str] = set()
        # Of the training that saved the file which was loaded last; see `Clock.progress`.
        self.progress: dict[str, np.ndarray] | None = None

    def call(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("State is saved, not called.")

    def variables(self) -> dict[str, Any]:
        """Returns every variable of the library by its name, also those that are not saved."""
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
            _key(hook, i): variable
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
        values: dict[str, Any] = dict(self.pending)
        for _, window in self._runtime.windows.named():
            window.gather()
        values.update((key, variable.numpy()) for key, variable in self._saved().items())
        new = [hook.name for hook in self._runtime.hooks if hook._built_for is None]
        values.update((f"{name}{_NEW}", np.int64(1)) for name in new)
        clock = self._runtime.clock
        # Workers would have to read metrics together, and one may save alone.
        alone = not strategies.has_workers(self._runtime.model)
        if alone and clock is not None and clock.progress is not None:
            values.update((f"{files.PROGRESS}.{k}", v) for k, v in clock.values().items())
        for key, value in values.items():
            # In HDF5 a slash begins a group.
            store[key.replace("/", _SLASH)] = value
        # Keras saves what has a private name last: all else is in the file by now.
        files.seal(store)

    def load_own_variables(self, store: Any) -> None:
        files.check_seal(store)
        given = {key.replace(_SLASH, "/"): np.asarray(store[key]) for key in store.keys()}
        new = {key for key in given if key.endswith(_NEW)}
        start = f"{files.PROGRESS}."
        progress = {k.removeprefix(start): v for k, v in given.items() if k.startswith(start)}
        given = {k: v for k, v in given.items() if k not in new and not k.startswith(start)}
        self._check(given)
        self.progress = progress or None
        self.pending = given
        names = {hook.name for hook in self._runtime.hooks}
        self.awaited = {name for name in names if f"{name}{_NEW}" not in new}
        self._runtime.windows.loaded()
        self.restore_pending()

    def _check(self, given: dict[str, np.ndarray]) -> None:
        way_out = "Load the file into a model with the same hooks."
        for key, variable in self._saved().items():
            if key not in given:
                continue
            shape, dtype = given[key].shape, given[key].dtype
            if shape != tuple(variable.shape):
                raise ValueError(
                    f"The saved state of {key!r} has shape {shape}, the hook's "
                    f"variable {tuple(variable.shape)}. {way_out}"
                )
            if dtype.kind in "OSUmM":
                raise ValueError(f"The saved state of {key!r} is no number: {dtype}. {way_out}")
        for name, keys in self._keys_of_hooks().items():
            lost = [key for key in keys if key not in given]
            if 0 < len(lost) < len(keys):
                raise ValueError(
                    f"The saved state of hook {name!r} is incomplete: {lost[0]!r} is missing. "
                    f"{way_out}"
                )

    def _keys_of_hooks(self) -> dict[str, list[str]]:
        hooks = [hook for hook in self._runtime.hooks if hook.variables]
        return {h.name: [_key(h, i) for i in range(len(h.variables))] for h in hooks}

    def pending_of(self, name: str) -> list[str]:
        """Returns what is loaded and not given yet, of the names that begin so."""
        start = f"{name}."
        return [key.removeprefix(start) for key in self.pending if key.startswith(start)]

    def restore_pending(self) -> None:
        """Gives loaded values to the variables that exist by now."""
        if not self.pending and not self.awaited:
            return
        of_hooks = self._keys_of_hooks()
        lost = [n for n in of_hooks if n in self.awaited and of_hooks[n][0] not in self.pending]
        if lost:
            warnings.warn(
                f"The file that was loaded has no state of the hooks {', '.join(lost)}: they "
                "begin as if nothing had been trained. Names of hooks must be those that they "
                "had when the file was saved.",
                stacklevel=2,
            )
        self.awaited -= of_hooks.keys()
        if self.pending:
            self._check(self.pending)
        for key, variable in self._saved().items():
            if key in self.pending:
                variable.assign(self.pending.pop(key))


def _key(hook: Any, place: int) -> str:
    """Returns the name in files of a variable of a hook's."""
    return f"{hook.name}.{place}.{hook.variables[place].name}"
