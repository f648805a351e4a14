"""The function that `fit` calls for each execution: one trace for each set of weights."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from keras_tapefit.training import building, custom_steps, strategies
from keras_tapefit.training.runtime import Runtime
from keras_tapefit.training.scope import StepScope, step_scope
from keras_tapefit.training.shared import StaleTrace, TracedFunction, check_user, place
from keras_tapefit.update import optimizers
from keras_tapefit.update.order import order_findings
from keras_tapefit.update.trainable import Flags


class TrainFunction(TracedFunction):
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
        traces, where = place(
            self._runtime.shared, self._model, "train", key, iterator, self._traces
        )
        if where not in traces:
            new_names: list[str] = []
            self._warn_of_order()
            is_shared = traces is not self._traces
            traces[where] = (self._make(new_names, is_shared), new_names)
        function, names = traces[where]
        try:
            return function(iterator), names
        except StaleTrace:
            del traces[where]
            return self._call(key, iterator)

    def forget(self) -> None:
        """Lets go of all traces of the model's own."""
        self._traces.clear()
        self._current = None

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

    def _make(self, names: list[str], is_shared: bool = False) -> Callable[[Any], Any]:
        def step(data: Any) -> Any:
            check_user(self._runtime.shared, self._model, is_shared)
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


class TestFunction(TracedFunction):
    """Calls the traced step that evaluates the model as it is now.

    For models that share traces, and hooks that look at the gradients of validation.

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
        shared = self._runtime.shared
        traces, where = place(shared, self._model, "test", key, iterator, self._traces)
        if where not in traces:
            traces[where] = (self._make(traces is not self._traces), [])
        try:
            return traces[where][0](iterator)
        except StaleTrace:
            del traces[where]
            return self(iterator)

    def forget(self) -> None:
        """Lets go of all traces of the model's own."""
        self._traces.clear()

    def _make(self, is_shared: bool) -> Callable[[Any], Any]:
        def step(data: Any) -> Any:
            check_user(self._runtime.shared, self._model, is_shared)
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
