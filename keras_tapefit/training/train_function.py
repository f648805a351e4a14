"""The function that `fit` calls for each execution: one trace for each set of weights."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_tapefit.hooks import order_findings
from keras_tapefit.training import building, custom_steps, strategies
from keras_tapefit.training.runtime import Runtime
from keras_tapefit.training.scope import StepScope, step_scope
from keras_tapefit.update import optimizers
from keras_tapefit.update.trainable import Flags


class TrainFunction:
    """Calls the traced step that fits the model as it is now.

    The `trainable` flags and the hooks decide which. Each combination is traced once
    and kept, so going back to one that was there before costs nothing.

    Args:
        model: the model.
        runtime: its private side.
        own_step: whether its `train_step` is a user's own.
    """

    def __init__(self, model: Any, runtime: Runtime, own_step: bool = False) -> None:
        self._model = model
        self._own_step = own_step
        self._runtime = runtime
        self._traces: dict[Any, tuple[Callable[[Any], Any], list[str]]] = {}
        self._flags: Flags | None = None
        self._current: Any = None
        self._told: set[str] = set()
        self._prepared: Any = None

    def refresh(self) -> None:
        """Looks up the model's layers again, for the case that some were added."""
        self._flags = None

    def __call__(self, iterator: Any) -> Any:
        runtime = self._runtime
        self._prepare()
        runtime.follow_schedules()
        key = self._key()
        if key != self._current:
            self._keep_averages()
        with self._listening():
            logs, names = self._call(key, iterator)
        runtime.steps += self._model.steps_per_execution
        if runtime.hooks or names:
            runtime.reports.live = names
            runtime.check_hooks()
        self._settle(key)
        return logs

    def _call(self, key: Any, iterator: Any) -> tuple[Any, list[str]]:
        """Returns the logs of an execution, and the names of the reports in them."""
        if key not in self._traces:
            new_names: list[str] = []
            self._warn_of_order()

            def make() -> Any:
                return self._make(new_names)

            self._traces[key] = (self._runtime.function("train", key, make), new_names)
        function, names = self._traces[key]
        return function(iterator), names

    def _prepare(self) -> None:
        """Makes the state that is missing; looks at the layers only where they may be new."""
        if not self._model.built:
            return
        optimizer = self._model.optimizer
        built = optimizer is None or optimizer.built
        found = (id(optimizer), built, self._runtime.hooks.structure())
        if self._flags is None or found != self._prepared:
            self._runtime.prepare(optimizer)
            built = optimizer is None or optimizer.built
            self._prepared = (found[0], built, found[2])

    def _listening(self) -> Any:
        if not self._own_step:
            return contextlib.nullcontext()
        if self._runtime.candidates():
            # Made before replicas run, which cannot make it.
            self._runtime.make_reports()
        return custom_steps.listening(self._runtime)

    def _warn_of_order(self) -> None:
        runtime = self._runtime
        leaves = list(optimizers.leaves(self._model.optimizer))
        for finding in order_findings(list(runtime.hooks), leaves, runtime.backward):
            if finding not in self._told:
                self._told.add(finding)
                warnings.warn(finding, stacklevel=2)

    def _key(self) -> Any:
        if self._flags is None:
            self._flags = Flags(self._model)
        structure: Any = self._runtime.hooks.structure()
        records = self._runtime.recording.structure()
        return self._flags.read(), structure if records is None else (structure, records)

    def _settle(self, key: Any) -> None:
        """Remembers a trace under the flags of a model that its first call completed."""
        if key != self._current:
            self._flags = None
            if not self._model.built and building.parts_are_built(self._model):
                self._model.built = True
            settled = self._key()
            if key in self._traces:
                self._traces.setdefault(settled, self._traces[key])
            self._current = settled

    def _keep_averages(self) -> None:
        optimizer = self._model.optimizer
        if optimizer is not None and optimizer.built:
            optimizers.average_only(optimizer, self._model.trainable_variables)

    def _make(self, names: list[str]) -> Callable[[Any], Any]:
        def step(data: Any) -> Any:
            with step_scope(self._runtime) as scope:
                if self._own_step:
                    scope.weight = tf.cast(custom_steps.batch_size(data), tf.float32)
                logs = self._model.train_step(data)
                logs = scope.finish(custom_steps.complete_logs(scope, logs, data))
            names[:] = scope.all_report_names()
            _warn_if_passed_over(self._runtime, scope)
            custom_steps.warn_of_scale(scope)
            custom_steps.check_accumulation(scope)
            if not isinstance(logs, dict) or not names:
                return logs
            return {**logs, **self._runtime.reports.results(names)}

        return strategies.make_function(self._model, step)


class TestFunction:
    """Calls the traced step that evaluates the model as it is now.

    For models with a source of traces, and hooks that look at the gradients of validation.

    Args:
        model: the model.
        runtime: its private side.
    """

    def __init__(self, model: Any, runtime: Runtime) -> None:
        self._model = model
        self._runtime = runtime
        self._traces: dict[Any, Any] = {}

    def __call__(self, iterator: Any) -> Any:
        if self._model.built:
            self._runtime.prepare(self._model.optimizer)
        # What is trained changes an evaluation too: layers may look at `trainable`.
        key = (Flags(self._model).read(), self._runtime.hooks.structure())
        if key not in self._traces:
            self._traces[key] = self._runtime.function("test", key, self._make)
        return self._traces[key](iterator)

    def _make(self) -> Callable[[Any], Any]:
        def step(data: Any) -> Any:
            return self._model.test_step(data)

        return strategies.make_function(self._model, step)


def _warn_if_passed_over(runtime: Runtime, scope: StepScope) -> None:
    if runtime.hooks and not scope.updated:
        names = ", ".join(repr(hook.name) for hook in runtime.hooks)
        warnings.warn(
            f"The `train_step` of {type(runtime.model).__name__} updates weights without "
            f"the gradient hooks {names}: they do nothing. Compute the loss inside "
            "`with self.gradient_tape() as tape:` and call `tape.minimize(loss)`, or "
            "pass the gradients to `self.apply_gradients(...)`.",
            stacklevel=2,
        )
