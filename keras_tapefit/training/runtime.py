"""The private side of a `TapeModel`, and how its state is made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import keras
import tensorflow as tf

from keras_tapefit.backward import Backpropagation, GradientMethod, MicroBatches
from keras_tapefit.backward.base import Computed
from keras_tapefit.backward.taps import Taps
from keras_tapefit.gradients.layers import layers_of, named_layers
from keras_tapefit.gradients.units import Unit, unit_axes
from keras_tapefit.hooks import HookList
from keras_tapefit.hooks.step import LogEntry, Outputs
from keras_tapefit.hooks.step import Step as HookStep
from keras_tapefit.training import keras_trainer, losses
from keras_tapefit.training.epoch_logs import EpochLogs
from keras_tapefit.training.recording import Recording
from keras_tapefit.training.state import State
from keras_tapefit.training.step_count import StepCount
from keras_tapefit.training.traces import Traces
from keras_tapefit.training.windows import Windows
from keras_tapefit.update import loaded_optimizers, optimizers, replicas, trainable
from keras_tapefit.update.making import may_reject


class TraceSource(Protocol):
    """A source of traces of other models; `keras_tapefit.tuning` has one."""

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
        self.step_count = StepCount()
        self.windows = Windows(self._named_optimizers, self.state.pending_of, self.scope)
        self.logs = EpochLogs(
            owners=self._reporting,
            has_gate=lambda: self.hooks.may_skip_steps,
            # Room for what is logged of each variable and of each layer.
            size=lambda: 128 + 4 * (len(self.candidates()) + len(layers_of(self.model))),
            scope=self.scope,
        )
        self.evaluating = False
        # Whether an epoch has begun in this process.
        self.has_trained = False
        # Whether the data of this training may end before Keras expects it to.
        self.may_run_out = False
        self.clock: Any = None
        # Places of variables to be frozen as soon as they are made.
        self.frozen_when_built: list[Any] = []
        # Of these, whose BatchNormalization keeps its statistics running.
        self.running_when_built: list[Any] = []
        self._units: dict[int, Unit] = {}
        self._owners: dict[int, int] = {}
        self._onlooker: Any = None
        self._functions = Traces()

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

    @property
    def has_window(self) -> bool:
        """Whether the model's own optimizer accumulates."""
        return self.optimizer in self.windows

    def gradient_method(self) -> GradientMethod:
        """Returns how the gradients of a batch are computed."""
        if self._onlooker is not None:
            # Of one batch in hand the plain gradient is what is looked at.
            return Backpropagation()
        if not self.backward.has_outputs and self.hooks.of_outputs:
            raise ValueError(
                f"The hook {self.hooks.of_outputs[0].name!r} looks at gradients of layer "
                f"outputs, and `{type(self.backward).__name__}` takes those of each example, "
                "apart from the step. Use another `backward=`, or remove the hook."
            )
        if self.micro_batches == 1:
            return self.backward
        return MicroBatches(self.backward, self.micro_batches, self.hooks.uses_parts)

    def taps(self, replaces: bool = False) -> Taps | None:
        """Returns the taps of a forward pass that hooks ask for, not open yet.

        Args:
            replaces: for a pass in which gradients may be replaced, and nobody looks.
        """
        hooks = [h for h in self.hooks.of_outputs if h._replaces_outputs or not replaces]
        asking = [hook._watcher for hook in hooks]
        if not replaces and self._onlooker is not None:
            asking.append(self._onlooker)
        if not asking:
            return None
        taps = Taps(asking, named_layers(self.model), replaces)
        taps.scale = optimizers.loss_scale(self.optimizer)
        return taps

    @contextlib.contextmanager
    def watched_by(self, onlooker: Any) -> Iterator[None]:
        """Has somebody else than hooks look at what layers return, in this context."""
        self._onlooker = onlooker
        try:
            yield
        finally:
            self._onlooker = None

    def see_outputs(self, computed: Computed) -> list[LogEntry]:
        """Shows hooks what layers returned in a step; returns what they report."""
        step = HookStep(index=optimizers.updates_made(self.optimizer))
        context = tf.distribute.get_replica_context()
        replica = 0 if context is None else context.replica_id_in_sync_group
        outputs = Outputs(computed.taps, replicas.sum_over, replicas.count(), replica)
        self.hooks.see_outputs(outputs, step)
        return step.entries

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
            self.windows.prepare()
            if self.hooks:
                self.hooks.prepare(variables, self.unit, self._owner)
            self.logs.prepare()
            if self.has_window or any(hook.uses_step_count for hook in self.hooks):
                self.step_count.prepare(optimizer)
            self._prepare_records(variables)
            self.state.restore_pending()
        if self.divides_in_parts:
            losses.listen(self.model)
        self._freeze_what_was()

    def _prepare_records(self, variables: list[Any]) -> None:
        layers = named_layers(self.model) if self.hooks.of_outputs else []
        entries = [name for hook in self.hooks for name in hook._recorded_entries(layers)]
        self.recording.prepare(variables, self.model.steps_per_execution, tuple(entries))

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
        running, self.running_when_built = self.running_when_built, []
        kept = [variables[i] for i in running if i < len(variables)]
        if kept:
            trainable.set_trainable(self.model, kept, False, train_bn=True)

    def _check_prepared(self) -> None:
        unbuilt = [hook.name for hook in self.hooks if hook._built_for is None]
        optimizer = self.optimizer
        if unbuilt or (optimizer is not None and not optimizer.built):
            raise RuntimeError(
                "The state of the model's hooks and of its optimizer cannot be made inside "
                "`strategy.run`. Call `model.make_train_function()` once before, inside "
                "`with strategy.scope():`, with the model built."
            )

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

    def _reporting(self) -> list[Any]:
        return [*self.hooks, self.model, *([None] if self.may_reject() else [])]

    def run_once(self, key: Any, fn: Callable[[], None]) -> None:
        """Runs a function on all replicas, traced once for a key."""
        strategy = self.model.distribute_strategy
        if self.model.run_eagerly:
            strategy.run(fn)
            return
        key = (key, self.hooks.structure(), self.recording.structure())

        def make() -> Any:
            return tf.function(lambda: strategy.run(fn), autograph=False)

        self._functions.get_or_make(key, make)()

    def forget_optimizers(self) -> None:
        """Lets go of what belongs to optimizers that the model has no more."""
        self.windows.forget()
        self._functions.clear()

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
