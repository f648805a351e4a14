"""The functions that `fit` and `evaluate` call: one trace for each set of weights."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any

from keras_tapefit.training import building, custom_steps, files, strategies
from keras_tapefit.training.clock import Clock
from keras_tapefit.training.keras_trainer import Fetched
from keras_tapefit.training.runtime import Runtime
from keras_tapefit.training.traces import Traces
from keras_tapefit.update import optimizers
from keras_tapefit.update.order import order_findings
from keras_tapefit.update.trainable import Flags


class TracedFunction:
    """Base class of what calls the trace that fits the model as it is now.

    Args:
        model: the model.
        runtime: its private side.
    """

    kind: str

    def __init__(self, model: Any, runtime: Runtime) -> None:
        self._model = model
        self._runtime = runtime
        self._traces = Traces()
        self._flags: Flags | None = None

    def refresh(self) -> None:
        """Looks up the model's layers again, for the case that some were added."""
        self._flags = None

    def _flags_now(self) -> tuple[bool, ...]:
        if self._flags is None:
            self._flags = Flags(self._model)
        return self._flags.read()

    def _function(self, key: Any) -> Callable[[Any], Any]:
        source = self._runtime.trace_source
        if source is None:
            return self._traces.get_or_make(key, self._make)
        lent = functools.partial(source.function, self._model, self.kind, key, self._make)
        return self._traces.get_or_make(key, lent)

    def _make(self) -> Callable[[Any], Any]:
        return strategies.make_function(self._model, self._step)

    def _step(self, data: Any) -> Any:
        raise NotImplementedError


class TrainFunction(TracedFunction):
    """Calls the traced step that fits the model as it is now.

    The `trainable` flags, the hooks, the records and the windows decide which.

    Args:
        model: the model.
        runtime: its private side.
        clock: knows the epoch.
        is_custom: whether its `train_step` is a user's own.
    """

    kind = "train"

    def __init__(self, model: Any, runtime: Runtime, clock: Clock, is_custom: bool) -> None:
        super().__init__(model, runtime)
        self._clock = clock
        self._is_custom = is_custom
        self._current: Any = None
        self._said: set[str] = set()
        self._prepared: Any = None
        # Whether data may end before Keras expects it to.
        self.may_run_out = True

    def __call__(self, iterator: Any) -> Any:
        runtime = self._runtime
        if self._clock.resumes_epoch():
            self._clock.pass_over(iterator)
            return {**self._model.get_metrics_result(), **runtime.logs.results()}
        if self.may_run_out:
            # A step without a batch would count as one all the same.
            iterator = Fetched(iterator, self._model.steps_per_execution)
        self._prepare()
        self._clock.follow()
        key = self._key()
        if key != self._current:
            self._begin(key)
        # Without a graph, what raises in a step may come after a part of it.
        eager = self._model.run_eagerly
        undoing = files.unchanged_on_error(runtime) if eager else contextlib.nullcontext()
        with self._listening(), undoing:
            logs = self._function(key)(iterator)
        runtime.check_hooks()
        self._settle(key)
        return logs

    def _step(self, data: Any) -> Any:
        if self._is_custom:
            return custom_steps.run(self._runtime, self._model.train_step, data)
        return self._model.train_step(data)

    def _prepare(self) -> None:
        """Makes the state that is missing; looks at the layers only where they may be new."""
        if not self._model.built:
            return
        runtime, optimizer = self._runtime, self._model.optimizer
        steps = [leaf.gradient_accumulation_steps for leaf in optimizers.leaves(optimizer)]
        found = (id(optimizer), runtime.hooks.structure(), steps, runtime.has_window)
        if self._flags is None or found != self._prepared:
            runtime.prepare()
            self._prepared = (*found[:3], runtime.has_window)

    def _listening(self) -> Any:
        if not self._is_custom:
            return contextlib.nullcontext()
        return custom_steps.listening(self._runtime)

    def _key(self) -> Any:
        runtime = self._runtime
        windows = runtime.windows.structure()
        structure = (runtime.hooks.structure(), runtime.recording.structure(), windows)
        return self._flags_now(), structure

    def _begin(self, key: Any) -> None:
        runtime, optimizer = self._runtime, self._model.optimizer
        if optimizer is not None and optimizer.built:
            optimizers.average_only(optimizer, self._model.trainable_variables)
        if key in self._traces:
            return
        leaves = list(optimizers.leaves(optimizer))
        for finding in order_findings(list(runtime.hooks), leaves, runtime.backward):
            self.say(finding)
        if runtime.logs.made is not None:
            kept = [hook for _, structure in self._traces for hook, _ in structure[0]]
            runtime.logs.made.keep([*kept, *runtime.hooks, self._model, None])

    def say(self, finding: str | None) -> None:
        """Warns of a finding, once."""
        if finding is not None and finding not in self._said:
            self._said.add(finding)
            warnings.warn(finding, stacklevel=4)

    def _settle(self, key: Any) -> None:
        """Remembers a trace under the flags and windows that its first call completed."""
        if key == self._current:
            return
        self._flags = None
        if not self._model.built and building.parts_are_built(self._model):
            self._model.built = True
        settled = self._key()
        if settled != key and settled[1][:2] == key[1][:2] and key in self._traces:
            self._traces.setdefault(settled, self._traces[key])
        self._current = settled


class TestFunction(TracedFunction):
    """Calls the traced step that evaluates the model as it is now.

    What is trained changes an evaluation too: layers and regularizers look at it.
    """

    kind = "test"

    def __call__(self, iterator: Any) -> Any:
        if self._flags is None and self._model.built:
            # Once an evaluation, not once a batch.
            self._runtime.prepare()
        return self._function((self._flags_now(), self._runtime.hooks.structure()))(iterator)

    def _step(self, data: Any) -> Any:
        return self._model.test_step(data)
