"""What a model of ours keeps beside what Keras keeps: hooks, their state, the clock."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import tensorflow as tf

from keras_tapefit.backward import Backpropagation, GradientMethod, MicroBatches
from keras_tapefit.gradients import Gradients
from keras_tapefit.gradients.units import Unit, unit_axes
from keras_tapefit.hooks import HookList
from keras_tapefit.hooks.reports import Reports
from keras_tapefit.training import keras_trainer
from keras_tapefit.training.recording import Recording
from keras_tapefit.training.saved_state import SavedState
from keras_tapefit.update import optimizers, trainable
from keras_tapefit.update.accumulation import Accumulation
from keras_tapefit.update.compiled import update_compiled
from keras_tapefit.update.rollback import Rollback
from keras_tapefit.update.update import Outcome, may_reject, update
from keras_tapefit.update.watch import Watch


class TraceSource(Protocol):
    """Where a model gets what it has no trace of its own for."""

    def function(
        self, model: Any, kind: str, key: Any, make: Callable[[], Callable[[Any], Any]]
    ) -> Callable[[Any], Any]:
        """Returns a function of an iterator, which the model keeps under `key`."""


class Runtime:
    """The private side of one model.

    Args:
        model: the model; it holds the runtime, not the other way round in time.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.hooks = HookList()
        self.backward: GradientMethod = Backpropagation()
        self.micro_batches = 1
        self.jit_compile: Any = "auto"
        self.epoch = 0
        self.recording = Recording()
        self.state = SavedState(self.hooks, self.recording, lambda: trainable.seeds(model))
        self.scheduled: set[int] = set()
        self._followed: set[Any] = set()
        self.steps = 0
        self.evaluating = False
        self.window: Accumulation | None = None
        self._window_of: Any = None
        self.flushes: dict[Any, Any] = {}
        self._reports: Reports | None = None
        self._units: dict[int, Unit] = {}
        self._owners: dict[int, int] = {}
        self.trace_source: TraceSource | None = None

    def candidates(self) -> list[Any]:
        """Returns the variables that are trained when nothing is frozen."""
        return trainable.trainable_candidates(self.model)

    def gradient_method(self) -> GradientMethod:
        """Returns how the gradients of a batch are computed."""
        if self.micro_batches == 1:
            return self.backward
        return MicroBatches(self.backward, self.micro_batches)

    def may_reject(self) -> bool:
        """Whether a step can be skipped as a whole."""
        return may_reject(getattr(self.model, "optimizer", None), self.hooks)

    def prepare(self, optimizer: Any = None) -> None:
        """Makes the state of optimizer, hooks and logs, where it is not made yet.

        Harmless to call often, in a trace too; where the model has no weights yet, it
        is called again once it has.
        """
        if tf.distribute.has_strategy() and not tf.distribute.in_cross_replica_context():
            # Inside one replica variables cannot be made: they were made outside.
            return
        variables = self.candidates()
        if not variables:
            return
        own = optimizer is not None and optimizer is getattr(self.model, "optimizer", None)
        with tf.init_scope(), self._strategy_scope():
            if own:
                self._make_window(optimizer, variables)
            if self.hooks:
                self.hooks.prepare(variables, self.unit, self._owner)
                self.state.restore_pending()
                self.make_reports()
            if self.recording.prepare(variables, self.model.steps_per_execution):
                self.state.restore_pending()
        if own:
            # Not lifted out of a trace: an optimizer may read the weights, which have
            # no values yet where that trace is what makes them.
            with self._strategy_scope():
                optimizers.build(optimizer, variables)

    def _make_window(self, optimizer: Any, variables: list[Any]) -> None:
        num_steps = optimizers.take_over_accumulation(optimizer)
        if num_steps == 1:
            self.window = None
        elif self.window is None or self._window_of is not optimizer:
            self.window = Accumulation(variables, num_steps)
            self._window_of = optimizer

    def window_of(self, optimizer: Any) -> Accumulation | None:
        """Returns the window in which an optimizer's gradients accumulate, if any."""
        if optimizer is getattr(self.model, "optimizer", None):
            self.prepare(optimizer)
            return self.window
        return None

    def hook_variables(self) -> list[Any]:
        """Returns the state of hooks that a rejected step must not change."""
        lasting = {id(v) for hook in self.hooks for v in hook._lasting}
        return [v for hook in self.hooks for v in hook.variables if id(v) not in lasting]

    def _strategy_scope(self) -> Any:
        strategy = keras_trainer.strategy_of(self.model)
        return contextlib.nullcontext() if strategy is None else strategy.scope()

    def unit(self, variable: Any) -> Unit:
        """Returns how a variable of the model divides into units."""
        if id(variable) not in self._units:
            self._units = unit_axes(self.model)
        # A bare variable belongs to no layer: it is one unit.
        whole = Unit(tuple(range(len(variable.shape))))
        return self._units.get(id(variable), whole)

    def _owner(self, variable: Any) -> int:
        if id(variable) not in self._owners:
            self._owners = trainable.owners(self.model)
        return self._owners.get(id(variable), id(variable))

    @property
    def reports(self) -> Reports:
        """The log entries of the epoch."""
        return self.make_reports()

    def make_reports(self) -> Reports:
        """Makes room for log entries, outside replicas, where there is none yet."""
        if self._reports is None:
            with tf.init_scope(), self._strategy_scope():
                self._reports = Reports(128 + 4 * len(self.candidates()))
        return self._reports

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Marks an evaluation, which may come in the middle of an epoch."""
        before, self.evaluating = self.evaluating, True
        try:
            yield
        finally:
            self.evaluating = before

    def begin_training(self) -> None:
        """Reads the step count once; from here on it is counted without the device."""
        optimizer: Any = getattr(self.model, "optimizer", None)
        built = optimizer is not None and optimizer.built
        self.steps = int(optimizer.iterations.numpy()) if built else 0

    def begin_epoch(self, epoch: int | None = None) -> None:
        """Starts the log entries anew."""
        if epoch is not None:
            self.epoch = epoch
        if self._reports is not None:
            self._reports.reset()

    def report_results(self) -> dict[str, tf.Tensor]:
        """Returns the log entries so far."""
        if self._reports is None:
            return {}
        return self._reports.results(self._reports.live)

    def volatile_variables(self) -> list[Any]:
        """Returns what a step may change beside the optimizer's update."""
        trained = {id(v) for v in self.candidates()}
        everything = [
            *self.model.variables,
            *self.model.metrics_variables,
            *(v for metric in self.model.metrics for v in metric.variables),
            *trainable.recurrent_states(self.model),
        ]
        if self.window is None:
            # With a window the hooks run at its end, and are put back there.
            everything += self.hook_variables()
        found = {id(v): v for v in everything if id(v) not in trained}
        return list(found.values())

    def rollback(self) -> Rollback | None:
        """Puts aside what a rejected step must not leave behind."""
        return Rollback(self.volatile_variables()) if self.may_reject() else None

    def update(
        self,
        gradients: Gradients,
        optimizer: Any,
        scaled: bool,
        loss: Any = None,
        parts: Any = None,
        watch: Watch | None = None,
    ) -> Outcome:
        """Takes gradients to the weights, through the hooks."""
        self.prepare(optimizer)
        make = update_compiled if self.jit_compile == "update" else update
        return make(gradients, optimizer, self.hooks, scaled, loss, parts, watch)

    def follow_schedules(self) -> None:
        """Freezes and unfreezes what hooks say for this epoch and step."""
        if any(hook.uses_step_count for hook in self.hooks):
            self.begin_training()
        wanted: set[int] = set()
        held: set[int] = set()
        for hook in self.hooks:
            if hook not in self._followed:
                held.update(hook.held_positions())
            wanted.update(hook.frozen_positions(self.epoch, self.steps))
        self._followed = set(self.hooks)
        if wanted == self.scheduled and not held:
            return
        self.scheduled |= held
        candidates = self.candidates()
        released = [candidates[i] for i in sorted(self.scheduled - wanted)]
        frozen = [candidates[i] for i in sorted(wanted)]
        self.scheduled = wanted
        if released:
            trainable.set_trainable(self.model, released, True)
        if frozen:
            trainable.set_trainable(self.model, frozen, False)

    def function(self, kind: str, key: Any, make: Callable[[], Any]) -> Callable[[Any], Any]:
        """Returns a function of an iterator for an execution, from the source of traces.

        Args:
            kind: `"train"` or `"test"`.
            key: what the model keeps it under.
            make: makes one afresh.
        """
        if self.trace_source is None:
            return make()
        return self.trace_source.function(self.model, kind, key, make)

    def check_hooks(self) -> None:
        """Lets hooks stop the training."""
        for hook in self.hooks:
            hook.check_state()


def runtime_of(model: Any) -> Runtime:
    """Returns the runtime of a model, made when it is first asked for.

    It lives past Keras's attribute tracking, and needs no `__init__` of its own: people
    initialise trainers by name.
    """
    runtime = model.__dict__.get("_tapefit_runtime")
    if runtime is None:
        runtime = Runtime(model)
        model.__dict__["_tapefit_runtime"] = runtime
        model.__dict__["_tapefit_state"] = runtime.state
    return runtime
