"""What a model of ours has besides what Keras gives it, and how its state is made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import keras
import numpy as np
import tensorflow as tf

from keras_tapefit.backward import Backpropagation, GradientMethod, MicroBatches
from keras_tapefit.gradients.units import Unit, unit_axes
from keras_tapefit.hooks import HookList
from keras_tapefit.hooks.log_entries import LogEntries
from keras_tapefit.training import keras_trainer, losses
from keras_tapefit.training.recording import Recording
from keras_tapefit.training.state import State
from keras_tapefit.update import loaded_optimizers, optimizers, trainable
from keras_tapefit.update.update import may_reject
from keras_tapefit.update.window import Window, change_steps, window_steps


class TraceSource(Protocol):
    """What may give a model the traces of another one; `keras_tapefit.tuning` has one."""

    def function(
        self, model: Any, kind: str, key: Any, make: Callable[[], Callable[[Any], Any]]
    ) -> Callable[[Any], Any]:
        """Returns a function of an iterator that runs one execution and returns its logs.

        Asked when the model has no trace for `key` yet, with all of its state made.

        Args:
            model: the model.
            kind: `"train"` or `"test"`.
            key: what decides the trace: flags of what is trained, structure of hooks,
                records and windows.
            make: makes the model's own function.
        """


class Runtime:
    """The private side of one model.

    Args:
        model: the model, which holds its runtime.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.hooks = HookList()
        self.backward: GradientMethod = Backpropagation()
        self.micro_batches = 1
        self.jit_compile: Any = "auto"
        self.recording = Recording()
        self.state = State(self)
        self.trace_source: TraceSource | None = None
        self.training_steps: Any = None
        self.made_entries: LogEntries | None = None
        self.evaluating = False
        # Whether the data of this training may end before Keras expects it to.
        self.may_run_out = False
        self.clock: Any = None
        # Places of variables to be frozen as soon as they are made.
        self.frozen_when_built: list[Any] = []
        self._windows: dict[int, tuple[Any, Window]] = {}
        self._window_steps: dict[int, int] = {}
        self._units: dict[int, Unit] = {}
        self._owners: dict[int, int] = {}
        self._functions: dict[Any, Callable[[], Any]] = {}

    @property
    def optimizer(self) -> Any:
        """The optimizer that the model is compiled with, or `None`."""
        return getattr(self.model, "optimizer", None)

    def candidates(self) -> list[Any]:
        """Returns the variables that are trained when nothing is frozen."""
        return trainable.trainable_candidates(self.model)

    def optimizers(self) -> list[Any]:
        """Returns the optimizers that the model holds as attributes, its own first."""
        return [optimizer for _, optimizer in self._named_optimizers()]

    def _named_optimizers(self) -> list[tuple[str, Any]]:
        found: dict[int, tuple[str, Any]] = {}
        for name, value in [("optimizer", self.optimizer), *sorted(vars(self.model).items())]:
            if isinstance(value, keras.optimizers.Optimizer):
                found.setdefault(id(value), (name, value))
        return list(found.values())

    @property
    def divides_in_parts(self) -> bool:
        """Whether a batch has parts, or is a part of a window."""
        return self.micro_batches > 1 or self.has_window

    def gradient_method(self) -> GradientMethod:
        """Returns how the gradients of a batch are computed."""
        if self.micro_batches == 1:
            return self.backward
        return MicroBatches(self.backward, self.micro_batches, self.hooks.uses_parts)

    def clock_restores(self) -> bool:
        """Whether this `fit` may continue another one."""
        return self.clock is not None and self.clock.restores

    def may_reject(self) -> bool:
        """Whether a step can be skipped as a whole."""
        return any(may_reject(optimizer, self.hooks) for optimizer in self.optimizers()) or (
            self.hooks.may_skip_steps
        )

    def prepare(self) -> None:
        """Makes the state of optimizer, windows, hooks, records and logs that is missing.

        Harmless to call often, in a trace too; where the model has no weights yet, it
        is called again once it has.

        Raises:
            RuntimeError: inside one of several replicas, where nothing can be made.
        """
        variables = self.candidates()
        if not variables:
            return
        if tf.distribute.has_strategy() and not tf.distribute.in_cross_replica_context():
            self._check_prepared()
            return
        optimizer = self.optimizer
        if optimizer is not None:
            # Not lifted out of a trace: an optimizer may read the weights, which have
            # no values yet where that trace is what makes them.
            with self.scope():
                optimizers.build(optimizer, variables)
                loaded_optimizers.restore(optimizer)
        with tf.init_scope(), self.scope():
            self._make_windows()
            if self.hooks:
                self.hooks.prepare(variables, self.unit, self._owner)
            self._make_entries()
            if self.has_window or any(hook.uses_step_count for hook in self.hooks):
                self._make_step_count()
            self.recording.prepare(variables, self.model.steps_per_execution)
            self.state.restore_pending()
        if self.divides_in_parts:
            losses.listen(self.model)
        self._freeze_what_was()

    def prepare_hooks(self) -> None:
        """Makes the state of hooks that have none yet, in the middle of a step.

        The model may have been built just now, and a loop by hand may call `train_step`
        past everything that prepares it.
        """
        if any(hook._built_for is None for hook in self.hooks):
            self.prepare()

    def _freeze_what_was(self) -> None:
        frozen, self.frozen_when_built = self.frozen_when_built, []
        variables = self.candidates()
        chosen = [variables[i] for i in frozen if i < len(variables)]
        if chosen:
            trainable.set_trainable(self.model, chosen, False)

    def _check_prepared(self) -> None:
        unbuilt = [hook.name for hook in self.hooks if hook._built_for is None]
        optimizer = self.optimizer
        if unbuilt or (optimizer is not None and not optimizer.built):
            raise RuntimeError(
                "The state of the model's hooks and of its optimizer cannot be made inside "
                "`strategy.run`. Call `model.make_train_function()` once before, inside "
                "`with strategy.scope():`, with the model built."
            )

    def _make_windows(self) -> None:
        for optimizer in self.optimizers():
            if optimizer.built:
                self._make_window(optimizer)

    def _make_window(self, optimizer: Any) -> None:
        steps = window_steps(optimizer)
        known = self._windows.get(id(optimizer), (None, None))[1]
        before = self._window_steps.setdefault(id(optimizer), steps)
        if before != steps:
            if known is not None and known.leftover_steps():
                # It takes effect with the next window.
                return
            change_steps(optimizer, before, steps)
            self._window_steps[id(optimizer)] = steps
            known = None
        if steps == 1:
            self._windows.pop(id(optimizer), None)
        elif known is None:
            window = Window(optimizer, steps)
            self._windows[id(optimizer)] = (optimizer, window)
            window.make_room(self.state.pending_of(self._name_of(optimizer)))

    def _name_of(self, optimizer: Any) -> str:
        names = {id(value): name for name, value in self._named_optimizers()}
        return f"window.{names.get(id(optimizer), optimizer.name)}"

    def window_of(self, optimizer: Any) -> Window | None:
        """Returns the window in which an optimizer's gradients accumulate, if any."""
        if id(optimizer) not in self._windows and window_steps(optimizer) > 1:
            with tf.init_scope(), self.scope():
                self._make_window(optimizer)
                self._make_entries()
        return self._windows.get(id(optimizer), (None, None))[1]

    def named_windows(self) -> Iterator[tuple[str, Any, Window]]:
        """Yields each window with a stable name and its optimizer."""
        for optimizer, window in self._windows.values():
            yield self._name_of(optimizer), optimizer, window

    @property
    def has_window(self) -> bool:
        """Whether the model's own optimizer accumulates."""
        return id(self.optimizer) in self._windows

    def open_windows(self) -> list[tuple[Any, Window]]:
        """Returns the windows that have steps left over; waits for the device."""
        return [pair for pair in self._windows.values() if pair[1].leftover_steps()]

    def loaded_state(self) -> None:
        """Has windows make room for what is being loaded."""
        for name, _, window in self.named_windows():
            window.make_room(self.state.pending_of(name))
            window.loaded()

    def scope(self) -> Any:
        """Returns the scope of the model's strategy."""
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
    def entries(self) -> LogEntries:
        """The log entries of the epoch."""
        if self.made_entries is None:
            with tf.init_scope(), self.scope():
                self._make_entries()
        assert self.made_entries is not None
        return self.made_entries

    def _make_entries(self) -> None:
        if self.made_entries is None:
            self.made_entries = LogEntries(128 + 4 * len(self.candidates()))

    def entry_names(self, validation: bool = False) -> list[str]:
        """Returns the names of the log entries that the hooks report now."""
        if self.made_entries is None:
            return []
        owners = [*self.hooks, self.model]
        owners += [None] if self.may_reject() else []
        return self.made_entries.names(owners, validation)

    def logged(self) -> dict[str, tf.Tensor]:
        """Returns the log entries so far."""
        names = self.entry_names()
        return self.made_entries.results(names) if self.made_entries is not None else {}

    def counted_steps(self) -> tuple[int, int]:
        """Returns how many steps of this epoch counted, and how many were skipped."""
        return (0, 0) if self.made_entries is None else self.made_entries.verdicts()

    def _make_step_count(self) -> None:
        if self.training_steps is None:
            optimizer = self.optimizer
            built = optimizer is not None and optimizer.built
            start = int(optimizer.iterations.numpy()) if built else 0
            self.training_steps = keras.Variable(
                np.int64(start * (window_steps(optimizer) if built else 1)),
                dtype="int64",
                trainable=False,
                autocast=False,
                aggregation="none",
                name="training_steps",
            )

    def steps_so_far(self) -> int:
        """Returns the number of steps of training; waits for the device."""
        if self.training_steps is not None:
            return int(self.training_steps.numpy())
        optimizer = self.optimizer
        return int(optimizer.iterations.numpy()) if optimizer is not None else 0

    def count_step(self, accepted: tf.Tensor | None) -> None:
        """Counts a step of training, for hooks that go by it; a rejected one never was."""
        if self.training_steps is not None:
            counted = 1 if accepted is None else tf.cast(accepted, tf.int64)
            self.training_steps.assign(self.training_steps.value + counted)

    def run_once(self, key: Any, fn: Callable[[], None]) -> None:
        """Runs a function on all replicas, traced once for a key."""
        strategy = self.model.distribute_strategy
        if self.model.run_eagerly:
            strategy.run(fn)
            return
        key = (key, self.hooks.structure(), self.recording.structure())
        if key not in self._functions:
            self._functions[key] = tf.function(lambda: strategy.run(fn), autograph=False)
        self._functions[key]()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Marks an evaluation, which may come in the middle of an epoch."""
        before, self.evaluating = self.evaluating, True
        try:
            yield
        finally:
            self.evaluating = before

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
